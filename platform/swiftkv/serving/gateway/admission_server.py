"""The one admission of all gateways, as a Serve deployment of exactly one replica.

Holds no rule of its own (admission.py does) and imports no engine, so that it starts again within a second or two.
What it knew is not stored: counters of the running minute begin anew, and places are told to it again by the
gateways' heartbeats.
Called by: gateway/app.py, which deploys it; gateways and serving/rollout, through its handle.
"""

import logging
import secrets
import time
from typing import Any

from swiftkv.metrics import count, record
from swiftkv.serving.gateway.admission import Admission
from swiftkv.serving.gateway.outcomes import VersionCounts, VersionReport, add_outcomes
from swiftkv.serving.gateway.settings import GatewaySettings, Targets
from swiftkv.serving.gateway.tickets import Decision, Report, Ticket

TELL_S = 1.0
"""Between two exports of what waits."""

GONE_LEASES = 6
"""A gateway that is silent for so many leases will not write its usage any more; a stop that passes is shorter."""

logger = logging.getLogger(__name__)


class AdmissionServer:
    """What `serve.deployment` makes the deployment `admission` of."""

    def __init__(self) -> None:
        self._admission: Admission | None = None
        self._epoch = secrets.token_hex(8)
        self._began_s = time.monotonic()
        self._counts: dict[str, VersionCounts] = {}
        self._told_s = 0.0
        self._targets: dict[str, Targets] = {}
        self._lease_s = 0.0
        self._unwritten: dict[str, tuple[float, int]] = {}
        """By gateway: when it reported last, and the tokens of usage that it had not written then."""

    def reconfigure(self, settings: dict[str, Any]) -> None:
        """Serve's hook, called with the first settings and with every later change of them."""
        parsed = GatewaySettings.model_validate(settings)
        self._targets = {model: of_model.targets for model, of_model in parsed.models.items()}
        if self._admission is None:
            self._admission = Admission(parsed)
            self._lease_s = parsed.lease_s
        else:
            self._admission.configure(parsed)

    async def acquire(self, ticket: Ticket) -> Decision:
        """See `Admission.acquire`."""
        assert self._admission is not None
        return await self._admission.acquire(ticket)

    async def report(self, report: Report) -> None:
        """See `Admission.report`."""
        assert self._admission is not None
        self._unwritten[report.gateway] = (time.monotonic(), report.unwritten_tokens)
        add_outcomes(self._counts, report.outcomes)
        await self._admission.report(report)
        self._tell()

    async def describe_versions(self) -> VersionReport:
        """What became of all gateways' requests at each version, for whoever compares versions (serving/rollout)."""
        assert self._admission is not None
        in_flight = self._admission.count_in_flight()
        return VersionReport(self._epoch, time.monotonic() - self._began_s, dict(self._counts), in_flight)

    def _tell(self) -> None:
        """Exports what waits, what engines have in hand, what is promised and what is lost; gateways report every
        second."""
        if self._admission is None or time.monotonic() - self._told_s < TELL_S:
            return
        self._told_s = time.monotonic()
        for model, found in self._admission.describe().items():
            record("swiftkv_gateway_queued_requests", found["queued_requests"] or 0, model=model)
            record("swiftkv_gateway_queued_prompt_tokens", found["queued_prompt_tokens"] or 0, model=model)
            record("swiftkv_gateway_in_flight_sequences", found["in_flight_sequences"] or 0, model=model)
        for model, targets in self._targets.items():
            for name, seconds in (("ttft", targets.ttft_s), ("tpot", targets.tpot_s)):
                if seconds is not None:
                    record("swiftkv_gateway_target_seconds", seconds, model=model, target=name)
        self._count_lost()

    def _count_lost(self) -> None:
        """Counts the usage of gateways that are gone, each once."""
        silent_since_s = time.monotonic() - GONE_LEASES * self._lease_s
        gone = [name for name, (seen_s, _) in self._unwritten.items() if seen_s < silent_since_s]
        lost_tokens = sum(self._unwritten.pop(name)[1] for name in gone)
        if lost_tokens:
            logger.error("usage of %d tokens is lost: a gateway had not written it when it vanished", lost_tokens)
            count("swiftkv_usage_lost_tokens_total", lost_tokens)


class HandleAdmission:
    """The shared admission as a gateway sees it: Serve's handle, with a call that can be cancelled."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def acquire(self, ticket: Ticket) -> Decision:
        """Raises: RayError or RayServeException if admission cannot be reached."""
        return await _await_response(self._handle.acquire.remote(ticket))

    async def report(self, report: Report) -> None:
        """Raises: as `acquire`."""
        await _await_response(self._handle.report.remote(report))


async def _await_response(response: Any) -> Any:
    is_over = False
    try:
        result = await response
        is_over = True
        return result
    finally:
        if not is_over:
            response.cancel()  # Serve does not do so when only the waiting for it is cancelled
