"""In which order waiting requests are served: strict classes, and within one start-time fair queueing by tokens.

Each tenant has a tag, the virtual time at which its next request starts: served tokens over weight. It may lag behind
the class's own virtual time by a bounded credit: a tenant that has kept below its share goes before one that floods,
for that many tokens, and nobody saves up more by having been idle. Holds no clock, no limit and no task.
Called by: gateway/fair_queue.py.
Source: Goyal, Vin and Cheng, Start-time Fair Queueing (1996); the correction by real usage is that of VTC (Sheng et
al., Fairness in Serving Large Language Models, 2024).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from swiftkv.serving.gateway.tickets import Ticket


class Waiting(Protocol):
    """Something with a ticket."""

    @property
    def ticket(self) -> Ticket: ...


AnyWaiting = TypeVar("AnyWaiting", bound=Waiting)


@dataclass
class _Flow(Generic[AnyWaiting]):
    """One tenant's requests of one class, first come first served."""

    weight: float
    tag: float = 0.0
    waiting: dict[str, AnyWaiting] = field(default_factory=dict)
    prompt_tokens: int = 0
    cost_tokens: int = 0


@dataclass
class _Class(Generic[AnyWaiting]):
    virtual_time: float = 0.0
    flows: dict[str, _Flow[AnyWaiting]] = field(default_factory=dict)
    backlogged: dict[str, _Flow[AnyWaiting]] = field(default_factory=dict)


@dataclass(frozen=True)
class Ahead:
    """What will be served before a request that comes now."""

    prompt_tokens: float
    requests: float


class FairOrder(Generic[AnyWaiting]):
    """Requests that wait, by class and tenant."""

    def __init__(self, credit_tokens: int) -> None:
        """`credit_tokens` is what a tenant of weight 1 can save up."""
        self.credit_tokens = credit_tokens
        self._classes: dict[int, _Class[AnyWaiting]] = {}

    def __len__(self) -> int:
        return sum(len(flow.waiting) for group in self._classes.values() for flow in group.backlogged.values())

    def __iter__(self) -> Iterator[AnyWaiting]:
        flows = [flow for group in self._classes.values() for flow in group.backlogged.values()]
        return iter([waiting for flow in flows for waiting in flow.waiting.values()])

    @property
    def prompt_tokens(self) -> int:
        """Of all that wait."""
        return sum(flow.prompt_tokens for group in self._classes.values() for flow in group.backlogged.values())

    def count(self, tenant: str) -> int:
        """How many of a tenant's requests wait."""
        groups = self._classes.values()
        return sum(len(group.backlogged[tenant].waiting) for group in groups if tenant in group.backlogged)

    def add(self, waiting: AnyWaiting) -> None:
        """Puts it behind all of its tenant and class."""
        ticket = waiting.ticket
        group = self._classes.setdefault(ticket.priority, _Class())
        flow = group.flows.setdefault(ticket.tenant, _Flow(ticket.weight))
        flow.weight = ticket.weight
        if not flow.waiting:
            flow.tag = self._start_of(group, flow)
            group.backlogged[ticket.tenant] = flow
        flow.waiting[ticket.id] = waiting
        flow.prompt_tokens += ticket.prompt_tokens
        flow.cost_tokens += ticket.cost_tokens

    def remove(self, ticket: Ticket) -> None:
        """Takes it out unserved and uncharged. Does nothing if it does not wait."""
        group = self._classes.get(ticket.priority)
        flow = group.flows.get(ticket.tenant) if group else None
        if group is None or flow is None or flow.waiting.pop(ticket.id, None) is None:
            return
        flow.prompt_tokens -= ticket.prompt_tokens
        flow.cost_tokens -= ticket.cost_tokens
        if not flow.waiting:
            del group.backlogged[ticket.tenant]

    def find_next(self) -> AnyWaiting | None:
        """Whose turn it is. Changes nothing."""
        for _, group in sorted(self._classes.items()):
            if group.backlogged:
                flow = min(group.backlogged.values(), key=lambda flow: flow.tag)
                return next(iter(flow.waiting.values()))
        return None

    def serve(self, ticket: Ticket) -> None:
        """Takes out what `find_next` gave and charges its tenant."""
        group = self._classes[ticket.priority]
        flow = group.flows[ticket.tenant]
        group.virtual_time = max(group.virtual_time, flow.tag)
        self.remove(ticket)
        flow.tag += ticket.cost_tokens / flow.weight

    def correct(self, ticket: Ticket, used_tokens: int) -> None:
        """Charges what a served request really used instead of what it was taken for."""
        group = self._classes.get(ticket.priority)
        flow = group.flows.get(ticket.tenant) if group else None
        if flow is not None:
            flow.tag += (used_tokens - ticket.cost_tokens) / flow.weight

    def look_ahead(self, ticket: Ticket) -> Ahead:
        """What is served before this one if it comes now and nothing comes after; within a tenant's queue pro rata."""
        tokens = requests = 0.0
        for priority, group in self._classes.items():
            if priority > ticket.priority:
                continue
            start = self._find_start(group, ticket) if priority == ticket.priority else float("inf")
            for tenant, flow in group.backlogged.items():
                is_own = priority == ticket.priority and tenant == ticket.tenant
                part = 1.0 if is_own else _part_before(flow, start)
                tokens += part * flow.prompt_tokens
                requests += part * len(flow.waiting)
        return Ahead(tokens, requests)

    def _find_start(self, group: _Class[AnyWaiting], ticket: Ticket) -> float:
        flow = group.flows.get(ticket.tenant, _Flow(ticket.weight))
        return self._start_of(group, flow) + flow.cost_tokens / ticket.weight

    def _start_of(self, group: _Class[AnyWaiting], flow: _Flow[AnyWaiting]) -> float:
        return max(flow.tag, group.virtual_time - self.credit_tokens / flow.weight)


def _part_before(flow: _Flow[AnyWaiting], start: float) -> float:
    """Part of another tenant's queue whose turn comes before virtual time `start`."""
    if flow.tag > start:
        return 0.0
    head = next(iter(flow.waiting.values())).ticket
    served = (start - flow.tag) * flow.weight + head.cost_tokens
    return min(1.0, served / max(1, flow.cost_tokens))
