"""Whose the seconds of an engine are: each step's, split over its requests by the FLOPs of their tokens, and idle ones.

Every second since the ledger began is in exactly one account, so that all accounts together are the engine's life. Pure
bookkeeping of times that are given; knows no vLLM.
Called by: engine/scheduler.py. Calls: engine/step_work.py.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from swiftkv.engine.step_work import Work

Phase = Literal["prefill", "transfer", "decode", "idle"]
"""transfer: nothing could be computed, because KV was on its way."""

Account = tuple[str, Phase]
"""Tenant and phase."""

NOBODY = "-"
"""Whom idle time is for, and requests that name nobody."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one request has of a step."""

    tenant: str
    phase: Phase
    flops: float
    """Executed; the step's time is split by them."""
    unmodified_flops: float
    """Of the unmodified model, for the same tokens."""


@dataclass(frozen=True, slots=True)
class Accounts:
    """What a ledger holds. Steps that run are in none of it yet."""

    seconds: dict[Account, float]
    unmodified_seconds: dict[str, float]
    """By tenant: what its steps would have taken if their time grew with the unmodified model's FLOPs. An estimate."""
    flops: dict[tuple[Phase, Work], float]


class Ledger:
    """Seconds by tenant and phase. Times are of one clock that only goes forward."""

    def __init__(self, now_s: float) -> None:
        self._seconds: dict[Account, float] = defaultdict(float)
        self._unmodified_s: dict[str, float] = defaultdict(float)
        self._flops: dict[tuple[Phase, Work], float] = defaultdict(float)
        self._settled_s = now_s
        self._scheduled: deque[Sequence[Share]] = deque()
        self._has_work = False

    def schedule(self, now_s: float, shares: Sequence[Share]) -> None:
        """A step is about to run. Steps end in the order in which they were scheduled."""
        if not self._has_work:
            self._settle(now_s, [])
        self._has_work = True
        self._scheduled.append(shares)

    def finish(self, now_s: float, waiting: Sequence[str], has_work: bool) -> None:
        """The oldest step is over. `waiting`: tenants of requests whose KV is on its way, to or from this engine;
        `has_work`: whether the engine goes on. What lies between a step and the next is the next one's."""
        shares = self._scheduled.popleft()
        for share in shares:
            self._flops[share.phase, "executed"] += share.flops
            self._flops[share.phase, "unmodified"] += share.unmodified_flops
        if not any(share.flops for share in shares):
            shares = [Share(tenant, "transfer", 1.0, 1.0) for tenant in waiting]
        self._settle(now_s, shares)
        self._has_work = has_work or bool(self._scheduled)

    def read(self, now_s: float) -> Accounts:
        """All of it, with the idle seconds until now."""
        if not self._has_work:
            self._settle(now_s, [])
        return Accounts(dict(self._seconds), dict(self._unmodified_s), dict(self._flops))

    def _settle(self, now_s: float, shares: Sequence[Share]) -> None:
        seconds, self._settled_s = now_s - self._settled_s, now_s
        total = sum(share.flops for share in shares)
        if not total:
            self._seconds[NOBODY, "idle"] += seconds
        for share in shares:
            if share.flops:
                self._seconds[share.tenant, share.phase] += seconds * share.flops / total
                self._unmodified_s[share.tenant] += seconds * share.unmodified_flops / total
