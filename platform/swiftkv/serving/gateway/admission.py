"""Whether and when a request may go to an engine: quotas, then the fair queue of its model; and who holds a place.

Plain asyncio, used in two places: once for all gateways (admission_server.py), and in each gateway while that one is
away. A place is a lease: its gateway must name it at each heartbeat, or it is given to others.
Called by: gateway/admission_server.py, gateway/admission_client.py. Calls: gateway/quotas.py, gateway/fair_queue.py.
"""

import asyncio
import math
from collections import Counter
from dataclasses import dataclass

from swiftkv.serving.gateway.fair_queue import FairQueue, QueueRefusal
from swiftkv.serving.gateway.quotas import Quotas
from swiftkv.serving.gateway.refusals import say_when
from swiftkv.serving.gateway.settings import Capacity, GatewaySettings
from swiftkv.serving.gateway.tickets import Decision, Finished, Held, Report, Ticket

LOST = "gateway_lost"
"""Code of a decision about a request whose gateway had given no sign of life."""

SWEEPS_PER_LEASE = 5


@dataclass
class _Lease:
    ticket: Ticket
    ends_s: float
    is_adopted: bool = False
    """Its quota was taken elsewhere."""
    application: str | None = None
    """The version that its gateway has asked."""


class Admission:
    """Quotas, queues and leases. All methods run on one event loop; its clock is the only one."""

    def __init__(self, settings: GatewaySettings, share: float = 1.0) -> None:
        """`share` is the part of every limit that holds here."""
        self._share = share
        self._lease_s = settings.lease_s
        self._quotas = Quotas()
        self._queues: dict[str, FairQueue] = {}
        self._leases: dict[str, _Lease] = {}
        self._waiting: dict[str, Ticket] = {}
        self._seen_s: dict[str, float] = {}
        self._next_sweep_s = 0.0
        self.configure(settings)

    def configure(self, settings: GatewaySettings) -> None:
        """Takes other limits and models; what is in flight and waiting stays."""
        for model, of_model in settings.models.items():
            capacity = _scale_capacity(of_model.capacity, self._share)
            if model in self._queues:
                self._queues[model].resize(capacity, settings.limits.ttft_target_s)
            else:
                self._queues[model] = FairQueue(capacity, settings.limits.ttft_target_s)

    async def acquire(self, ticket: Ticket) -> Decision:
        """Answers when the request's turn comes, or when it is clear that it will not come in time."""
        ticket = _scale_quotas(ticket, self._share)
        self._see(ticket.gateway)
        decision = self._quotas.take(ticket)
        if not decision.is_granted or not ticket.sequences:
            return decision
        if ticket.model not in self._queues:
            return Decision(False, {}, 503, "not_ready", f"the model {ticket.model} is being set up. Try again soon.")
        self._waiting[ticket.id] = ticket
        try:
            await self._queues[ticket.model].acquire(ticket)
        except QueueRefusal as refusal:
            self._quotas.give_back(ticket)
            return _explain(refusal, ticket, decision.headers)
        except asyncio.CancelledError:
            self._quotas.give_back(ticket)
            raise
        finally:
            del self._waiting[ticket.id]
        self._leases[ticket.id] = _Lease(ticket, _now_s() + self._lease_s)
        return decision

    async def report(self, report: Report) -> None:
        """Takes note of what happened in a gateway, and that it lives. The same report may come twice."""
        self._see(report.gateway)
        for held in report.held or ():
            self._renew(held)
        for ticket_id in report.started:
            if lease := self._leases.get(ticket_id):
                self._queues[lease.ticket.model].start(ticket_id)
        for finished in report.finished:
            self._finish(finished)

    def count_in_flight(self) -> dict[str, int]:
        """Requests that gateways hold, by the application that they asked; those of the last heartbeat."""
        return dict(Counter(lease.application for lease in self._leases.values() if lease.application))

    def describe(self) -> dict[str, dict[str, float | None]]:
        """What waits and what is in flight, by model."""
        return {model: queue.describe() for model, queue in self._queues.items()}

    def _see(self, gateway: str) -> None:
        """Notes a sign of life, and gives away the places of those that gave none."""
        now_s = _now_s()
        self._seen_s[gateway] = now_s
        if now_s >= self._next_sweep_s:
            self._next_sweep_s = now_s + self._lease_s / SWEEPS_PER_LEASE
            self._sweep(now_s)

    def _sweep(self, now_s: float) -> None:
        silent = {name for name, seen_s in self._seen_s.items() if seen_s < now_s - self._lease_s}
        for name in silent:
            del self._seen_s[name]
        # Those that wait go first, or the places that become free would be theirs.
        for ticket in [ticket for ticket in self._waiting.values() if ticket.gateway in silent]:
            self._queues[ticket.model].drop_waiting(ticket.id)
        for ticket_id, lease in list(self._leases.items()):
            if lease.ends_s < now_s:
                self._finish(Finished(ticket_id, used_tokens=None))

    def _renew(self, held: Held) -> None:
        ends_s = _now_s() + self._lease_s
        if lease := self._leases.get(held.ticket.id):
            lease.ends_s, lease.application = ends_s, held.application
        elif held.ticket.model in self._queues:
            self._queues[held.ticket.model].adopt(held.ticket, held.has_started)
            self._leases[held.ticket.id] = _Lease(held.ticket, ends_s, True, held.application)

    def _finish(self, finished: Finished) -> None:
        lease = self._leases.pop(finished.id, None)
        if lease is None:
            return
        self._queues[lease.ticket.model].release(finished.id, finished.used_tokens)
        if finished.used_tokens is not None and not lease.is_adopted:
            self._quotas.correct(lease.ticket, finished.used_tokens)


def _explain(refusal: QueueRefusal, ticket: Ticket, headers: dict[str, str]) -> Decision:
    predicted = f"its first token would come in about {refusal.predicted_s:.1f} s"
    if refusal.reason == "too_slow":
        message = f"the model is busy: {predicted}. Try again later, or with a shorter prompt."
        return Decision(False, headers | say_when(refusal.predicted_s / 2), 429, "overloaded", message)
    if refusal.reason == "queue_full":
        message = f"tenant {ticket.tenant} has as many requests waiting as it may. Wait for some to end."
        return Decision(False, headers | say_when(refusal.predicted_s / 2), 429, "queue_full", message)
    if refusal.reason == "deadline":
        return Decision(False, headers, 504, "deadline", "the request's time was over before its turn came.")
    return Decision(False, {}, 503, LOST, "the gateway gave no sign of life.")


def _scale_capacity(capacity: Capacity, share: float) -> Capacity:
    if share == 1:
        return capacity
    rate = capacity.prompt_tokens_per_s
    return capacity.model_copy(
        update={
            "max_in_flight_sequences": math.ceil(capacity.max_in_flight_sequences * share),
            "max_in_flight_prompt_tokens": math.ceil(capacity.max_in_flight_prompt_tokens * share),
            "max_queued_requests": math.ceil(capacity.max_queued_requests * share),
            "prompt_tokens_per_s": rate and rate * share,
        }
    )


def _scale_quotas(ticket: Ticket, share: float) -> Ticket:
    if share == 1:
        return ticket
    values = {name: getattr(ticket, name) for name in Ticket.__slots__}
    for name in ("requests_per_minute", "tokens_per_minute"):
        values[name] = values[name] and math.ceil(values[name] * share)
    return Ticket(**values)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
