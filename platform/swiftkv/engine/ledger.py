"""Whose the seconds of an engine are: each step's, split over its requests by the FLOPs of their tokens, and idle ones.

Every second since the ledger began is in exactly one account, so that all accounts together are the engine's life. Pure
bookkeeping of times that are given; knows no vLLM.
Called by: engine/scheduler.py.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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


class Ledger:
    """Seconds by tenant and phase. Times are of one clock that only goes forward."""

    def __init__(self, now_s: float) -> None:
        self._accounts: dict[Account, float] = defaultdict(float)
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
        if not any(share.flops for share in shares):
            shares = [Share(tenant, "transfer", 1.0) for tenant in waiting]
        self._settle(now_s, shares)
        self._has_work = has_work or bool(self._scheduled)

    def read(self, now_s: float) -> dict[Account, float]:
        """Seconds in each account; those of a step that runs are in none yet."""
        if not self._has_work:
            self._settle(now_s, [])
        return dict(self._accounts)

    def _settle(self, now_s: float, shares: Sequence[Share]) -> None:
        seconds, self._settled_s = now_s - self._settled_s, now_s
        total = sum(share.flops for share in shares)
        if not total:
            self._accounts[NOBODY, "idle"] += seconds
        for share in shares:
            if share.flops:
                self._accounts[share.tenant, share.phase] += seconds * share.flops / total
