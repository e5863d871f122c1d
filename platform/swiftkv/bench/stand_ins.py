"""Serve deployments in the place of engines: they take the time that the costs say, and report as real replicas do.

A prefill stand-in computes one prompt after another; a decode stand-in makes steps that grow with its sequences, after
the prefill pool has answered, as serving/decode.py does. Times are kept against one clock, so that a sleep which ends
late delays nobody else; how late they end is answered with every request. Computes nothing, and loads neither torch
nor vllm.
Called by: Ray Serve, through `swiftkv.bench.stand_ins:build_stand_ins`. Calls: serving/workload.py.
"""

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from ray import serve

from swiftkv.config import StrictModel
from swiftkv.serving.policy.costs import Costs
from swiftkv.serving.policy.settings import PoolLimits
from swiftkv.serving.workload import DecodeWorkload, PrefillWorkload, Served

_NO_DELAYS = dict.fromkeys(("upscale_delay_s", "downscale_delay_s", "downscale_to_zero_delay_s"), 0.0)


class StandInSettings(StrictModel):
    """Two pools of stand-ins."""

    costs: Costs
    """How long work takes."""

    prefill: PoolLimits = PoolLimits()
    """Limits of the prefill pool."""

    decode: PoolLimits = PoolLimits()
    """Limits of the decode pool."""

    initial_replicas: int | None = None
    """Of each pool. None: the minimum."""

    max_ongoing_requests: int = 64
    """Requests that one replica holds."""

    kv_lease_s: float = 10
    """Seconds for which a prefill replica counts KV as kept, and waits before it ends."""


@dataclass(frozen=True)
class Answer:
    """When things happened, by the machine's monotonic clock, in seconds."""

    first_token_s: float
    finished_s: float
    prefill_late_s: float
    """By how much the prompt was done after it should have been."""
    step_late_s: float
    """The same of the last decode step."""


@dataclass
class Sequence:
    """A request in a decode replica."""

    served: Served
    wanted_tokens: int
    done: asyncio.Future[float] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    first_token_s: float = 0.0

    @property
    def context_tokens(self) -> float:
        """Prompt and answer so far."""
        return self.served.prompt_tokens + self.served.completion_tokens


class StandInPrefill:
    """One prompt after another."""

    def __init__(self, settings: StandInSettings) -> None:
        self._costs, self._free_s = settings.costs, 0.0
        self._workload = PrefillWorkload(settings.kv_lease_s)

    async def __call__(self, prompt_tokens: int) -> float:
        """Seconds by which the prompt was done too late."""
        self._workload.begin(prompt_tokens)
        computed, seconds = 0, self._costs.prefill_s(prompt_tokens)
        try:
            self._free_s = max(time.monotonic(), self._free_s) + seconds
            late_s = await _sleep_until(self._free_s)
            self._workload.spend("computing", seconds)
            computed = prompt_tokens
        finally:
            self._workload.end(prompt_tokens, computed, computed)
        return late_s

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's hook."""
        return self._workload.report()

    async def __del__(self) -> None:
        """Serve's hook before it ends a replica: as serving/prefill.py has it."""
        await asyncio.sleep(self._workload.last_lease_s)


class StandInDecode:
    """Sequences that get a token each in every step."""

    def __init__(self, settings: StandInSettings, prefill: Any) -> None:
        self._costs, self._prefill = settings.costs, prefill
        self._workload = DecodeWorkload(settings.costs.kv_tokens)
        self._running: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()
        self._steps: asyncio.Task[None] | None = None

    async def __call__(self, prompt_tokens: int, completion_tokens: int) -> Answer:
        """Takes as long as the request would."""
        served = Served(prompt_tokens, prompt_tokens, is_remote=True)
        self._workload.begin(served)
        try:
            prefill_late_s = await self._prefill.remote(prompt_tokens)
            sequence = Sequence(served, completion_tokens)
            self._waiting.append(sequence)
            if self._steps is None or self._steps.done():
                self._steps = asyncio.create_task(self._make_steps())
            step_late_s = await sequence.done
        finally:
            self._workload.end(served)
        return Answer(sequence.first_token_s, time.monotonic() - step_late_s, prefill_late_s, step_late_s)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's hook."""
        return self._workload.report()

    async def _make_steps(self) -> None:
        now_s = time.monotonic()
        while self._admit():
            mean = sum(sequence.context_tokens for sequence in self._running) / len(self._running)
            now_s += self._costs.decode_step_s(len(self._running), mean)
            late_s = await _sleep_until(now_s)
            for sequence in self._running:
                sequence.first_token_s = sequence.first_token_s or now_s
                self._workload.take_chunk(sequence.served)
                if sequence.served.completion_tokens >= sequence.wanted_tokens:
                    sequence.done.set_result(late_s)
            self._running = [sequence for sequence in self._running if not sequence.done.done()]

    def _admit(self) -> bool:
        """Takes those in that have a place. Whether there is any sequence."""
        kv_tokens = sum(sequence.served.prompt_tokens + sequence.wanted_tokens for sequence in self._running)
        while self._waiting and len(self._running) < self._costs.max_num_seqs:
            kv_tokens += self._waiting[0].served.prompt_tokens + self._waiting[0].wanted_tokens
            if self._running and kv_tokens > self._costs.kv_tokens:
                break
            self._running.append(self._waiting.popleft())
        return bool(self._running)


async def _sleep_until(time_s: float) -> float:
    """Seconds by which it ended too late."""
    await asyncio.sleep(max(0.0, time_s - time.monotonic()))
    return time.monotonic() - time_s


def build_stand_ins(settings: StandInSettings) -> serve.Application:
    """The decode deployment, with the prefill deployment behind it; named as the policy knows them."""

    def deploy(kind: type, name: str, limits: PoolLimits) -> Any:
        replicas = {"min_replicas": limits.min_replicas, "max_replicas": limits.max_replicas}
        if settings.initial_replicas is not None:
            replicas["initial_replicas"] = settings.initial_replicas
        return serve.deployment(
            kind,
            name=name,
            autoscaling_config=replicas | _NO_DELAYS,
            max_ongoing_requests=settings.max_ongoing_requests,
            graceful_shutdown_timeout_s=settings.kv_lease_s + 120,
            ray_actor_options={"num_cpus": 0},
        )

    prefill = deploy(StandInPrefill, "Prefill:stand-in", settings.prefill).bind(settings)
    return deploy(StandInDecode, "Decode:stand-in", settings.decode).bind(settings, prefill)
