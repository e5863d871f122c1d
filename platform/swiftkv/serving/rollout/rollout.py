"""Does the steps of a rollout: looks at the alias, at Serve's applications and at the gateways' counts, then acts once.

Remembers nothing that matters: after a kill, a new one goes on from Serve's config; only watching begins anew.
Called by: rollout/app.py. Calls: rollout/steps.py, serve_config.py, judgement.py, registry/registry.py.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

from swiftkv import metrics
from swiftkv.errors import CheckpointError, IntegrityError, VersionNotFoundError
from swiftkv.registry.registry import AliasState, FetchedVersion, Registry
from swiftkv.serving.gateway.outcomes import VersionCounts, VersionReport
from swiftkv.serving.rollout import serve_config
from swiftkv.serving.rollout.judgement import Observation, Verdict, judge
from swiftkv.serving.rollout.record import Record, Rejection
from swiftkv.serving.rollout.settings import RolloutSettings
from swiftkv.serving.rollout.steps import choose_step

IDLE_LEASES = 2
"""Of the gateways' leases: so long nobody must have held a request of a version whose application is removed."""

logger = logging.getLogger("swiftkv.rollout")


class Serving(Protocol):
    """Serve's config, here or on a cluster."""

    def read(self) -> dict[str, Any]: ...

    def write(self, config: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Look:
    """What was found at one moment."""

    details: dict[str, Any]
    entries: list[serve_config.Entry]
    record: Record
    versions: dict[str, serve_config.ApplicationState]
    alias: AliasState


@dataclass(frozen=True)
class _Watch:
    """Since when a candidate is watched, and what was counted before."""

    version: str
    before: VersionReport
    began_s: float


class Rollout:
    """One model's versions."""

    def __init__(
        self,
        settings: RolloutSettings,
        own: str,
        serving: Serving,
        registry: Registry,
        report: Callable[[], Awaitable[VersionReport]],
        warm: Callable[[str], Awaitable[None]],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`own`: this application's name. `report` gives the gateways' counts; `warm` sends an application its first
        requests."""
        self._settings = settings
        self._own = own
        self._serving = serving
        self._registry = registry
        self._report = report
        self._warm = warm
        self._now_s = now_s
        self._alias: AliasState | None = None
        self._fetched: dict[str, FetchedVersion] = {}  # while held, the node's cache does not evict them
        self._starting_s: dict[str, float] = {}
        self._idle_s: dict[str, float] = {}
        self._watch: _Watch | None = None

    async def advance(self) -> None:
        """Looks, and does what is to be done next, if anything.

        Raises: RegistryError or its kinds, OSError, RuntimeError or Ray's errors if somebody does not answer.
        """
        look = await self._look()
        if serve_config.is_building(look.details):
            return
        metrics.record("swiftkv_rollout_share_frac", look.record.share, model=self._settings.model)
        gateway = serve_config.read_gateway(look.entries, self._settings)
        if gateway != serve_config.build_gateway(gateway, self._settings, look.record):
            await self._write(look, look.record, look.versions)  # its settings were deployed anew
            return
        step = choose_step(look.record, look.alias.version, look.alias.tag, look.versions)
        if step.kind == "add":
            await self._add(look, step.version)
        elif step.kind == "bring_up":
            await self._bring_up(look, step.version)
        elif step.kind == "watch":
            await self._watch_candidate(look, step.version)
        elif step.kind == "abandon":
            self._say("abandoned", step.version, reason="moved", alias=look.alias.version)
            await self._write(look, look.record.model_copy(update={"candidate": None, "share": 0}), look.versions)
        elif step.kind == "forget":
            self._say("lost", step.version, reason="its application is gone")
            is_rejected = look.record.rejects(look.alias.version, look.alias.tag)
            again = Record(candidate=step.version if is_rejected else None, rejected=look.record.rejected)
            await self._write(look, again, look.versions)
        elif step.kind == "remove":
            await self._remove(look, step.version)

    async def _look(self) -> Look:
        details = await asyncio.to_thread(self._serving.read)
        tag = None if self._alias is None else self._alias.tag
        names = self._settings.model, self._settings.alias
        self._alias = await asyncio.to_thread(self._registry.watch_alias, *names, tag) or self._alias
        assert self._alias is not None
        entries = serve_config.list_entries(details)
        record = serve_config.read_record(entries, self._own)
        return Look(details, entries, record, serve_config.find_versions(details, self._settings), self._alias)

    async def _add(self, look: Look, version: str) -> None:
        """Verifies the version and deploys its application beside the others."""
        streams = self._settings.version.args.get("stream", False)  # then its tensors are verified as they are loaded
        fetch = self._registry.fetch_without_weights if streams else self._registry.fetch
        try:
            self._fetched[version] = await asyncio.to_thread(fetch, self._settings.name_application(version))
        except (IntegrityError, VersionNotFoundError, CheckpointError) as error:
            await self._reject(look, version, "verify", str(error))
            return
        self._say("starting", version, stable=look.record.stable)
        self._starting_s[version] = self._now_s()
        record = look.record.model_copy(update={"candidate": version, "share": 0})
        await self._write(look, record, {*look.versions, version})

    async def _bring_up(self, look: Look, version: str) -> None:
        """Waits for the application, warms it, and lets it have requests: a share, or all if there is no other."""
        state = look.versions[version]
        if state.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            await self._reject(look, version, "start", _shorten(state.message))
            return
        if state.status != "RUNNING":
            if self._now_s() - self._starting_s.setdefault(version, self._now_s()) > self._settings.start_timeout_s:
                seconds = f"did not run within {self._settings.start_timeout_s:g} s: {_shorten(state.message)}"
                await self._reject(look, version, "start", seconds)
            return
        try:
            async with asyncio.timeout(self._settings.warm_timeout_s):
                await self._warm(self._settings.name_application(version))
        except Exception as error:  # whatever an engine says
            await self._reject(look, version, "warm", f"{type(error).__name__}: {_shorten(str(error))}")
            return
        if look.record.stable is None:
            await self._switch(look, version, "first", "")
            return
        self._say("canary", version, stable=look.record.stable, share=self._settings.share_frac)
        record = look.record.model_copy(update={"share": self._settings.share_frac})
        await self._write(look, record, look.versions)

    async def _watch_candidate(self, look: Look, version: str) -> None:
        report = await self._report()
        watch = self._watch
        if watch is None or (watch.version, watch.before.epoch) != (version, report.epoch):
            self._watch = _Watch(version, report, self._now_s())
            return
        verdict = judge(self._observe(look.record, watch, report), self._settings)
        for check in verdict.checks:
            if check.value is not None:
                metrics.record("swiftkv_rollout_check_ratio", check.value, model=self._settings.model, check=check.name)
        if verdict.action == "switch":
            await self._switch(look, version, verdict.reason, _describe(verdict))
        elif verdict.action == "drop":
            await self._reject(look, version, verdict.reason, _describe(verdict))

    def _observe(self, record: Record, watch: _Watch, report: VersionReport) -> Observation:
        def count(version: str | None) -> VersionCounts:
            name, nothing = self._settings.name_application(version or ""), VersionCounts()
            return report.counts.get(name, nothing).minus(watch.before.counts.get(name, nothing))

        in_flight = report.in_flight.get(self._settings.name_application(watch.version), 0)
        watched_s = self._now_s() - watch.began_s
        return Observation(count(record.stable), count(watch.version), in_flight, watched_s)

    async def _switch(self, look: Look, version: str, reason: str, figures: str) -> None:
        self._decide("switched", version, reason, replaced=look.record.stable, figures=figures)
        await self._write(look, Record(stable=version), look.versions)

    async def _reject(self, look: Look, version: str, reason: str, message: str) -> None:
        """Drops the version; it is not tried again until the alias moves."""
        self._decide("rejected", version, reason, stable=look.record.stable, message=message)
        rejected = Rejection(version=version, tag=look.alias.tag, reason=f"{reason}: {message}")
        await self._write(look, Record(stable=look.record.stable, rejected=rejected), look.versions)

    async def _remove(self, look: Look, version: str) -> None:
        """Removes an application that has no route, once gateways have held none of its requests for a while."""
        application = self._settings.name_application(version)
        report = await self._report()
        needed_s = IDLE_LEASES * serve_config.read_gateway(look.entries, self._settings).lease_s
        gateway_has_routes = look.details["applications"][self._settings.gateway]["status"] == "RUNNING"
        if not gateway_has_routes or report.age_s < needed_s or report.in_flight.get(application):
            self._idle_s.pop(version, None)
            return
        if self._now_s() - self._idle_s.setdefault(version, self._now_s()) < needed_s:
            return
        self._say("removed", version, stable=look.record.stable)
        await self._write(look, look.record, look.versions.keys() - {version})
        self._idle_s.pop(version)
        self._fetched.pop(version, None)

    async def _write(self, look: Look, record: Record, versions: Collection[str]) -> None:
        self._watch = None
        entries = serve_config.build_entries(look.entries, self._settings, self._own, record, versions)
        await asyncio.to_thread(self._serving.write, serve_config.build_config(look.details, entries))

    def _decide(self, event: str, version: str, reason: str, **more: Any) -> None:
        labels = {"model": self._settings.model, "outcome": event, "reason": reason}
        metrics.count("swiftkv_rollout_decisions_total", 1, **labels)
        self._starting_s.pop(version, None)
        self._say(event, version, reason=reason, **more)

    def _say(self, event: str, version: str, **more: Any) -> None:
        line = {"event": event, "model": self._settings.model, "version": version, **more}
        logger.info("%s", json.dumps(line))


def _describe(verdict: Verdict) -> str:
    return "; ".join(check.describe() for check in verdict.checks)


def _shorten(message: str) -> str:
    """The last lines of what Serve says, where a traceback has its cause."""
    return " ".join(message.split("\n")[-3:]).strip()[-500:]
