"""Requests and tokens per minute of each tenant, and the headers that tell it where it stands.

Tokens are taken by estimate when a request comes and corrected when its usage is known. The window is the sliding
counter of the `limits` library: constant memory per tenant, whatever the number of tokens. Restarted empty.
Called by: gateway/admission.py. Calls: limits.
"""

import math
import time
from dataclasses import dataclass
from functools import lru_cache

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from swiftkv.serving.gateway.refusals import say_when
from swiftkv.serving.gateway.tickets import Decision, Ticket

WINDOW_S = 60


@dataclass(frozen=True)
class _Quota:
    """One limit of one tenant, and what a request takes of it."""

    what: str
    item: RateLimitItem
    tenant: str
    cost: int


class Quotas:
    """The counters of all tenants."""

    def __init__(self) -> None:
        self._storage = MemoryStorage()
        self._limiter = SlidingWindowCounterRateLimiter(self._storage)

    def take(self, ticket: Ticket) -> Decision:
        """Takes the request and its estimated tokens, or neither and says when they will be there."""
        quotas = _find_quotas(ticket)
        for quota in quotas:
            if not self._limiter.test(quota.item, quota.tenant, cost=quota.cost):
                return self._refuse(quota, quotas)
        for quota in quotas:
            self._limiter.hit(quota.item, quota.tenant, cost=quota.cost)
        return Decision(is_granted=True, headers=self._describe(quotas))

    def give_back(self, ticket: Ticket) -> None:
        """Undoes `take`, for a request that no engine will see."""
        for quota in _find_quotas(ticket):
            self._add(quota, -quota.cost)

    def correct(self, ticket: Ticket, used_tokens: int) -> None:
        """Charges what the request used instead of what it was taken for; the limit can be passed by it."""
        for quota in _find_quotas(ticket):
            if quota.what == "tokens":
                self._add(quota, used_tokens - quota.cost)

    def _add(self, quota: _Quota, amount: int) -> None:
        key = quota.item.key_for(quota.tenant)
        _, current = self._storage.sliding_window_keys(key, WINDOW_S, time.time())
        if amount > 0:
            self._storage.incr(current, 2 * WINDOW_S, amount)
        elif amount < 0:
            # What was taken in the window before stays taken there: at most a minute too strict.
            self._storage.decr(current, -amount)

    def _refuse(self, quota: _Quota, quotas: list[_Quota]) -> Decision:
        per_minute = f"limit {quota.item.amount} {quota.what} per minute, this request {quota.cost}"
        wait_s = self._wait_s(quota)
        if math.isinf(wait_s):
            message = f"the request is larger than the whole quota of tenant {quota.tenant}: {per_minute}. Shorten it."
        else:
            message = f"the quota of tenant {quota.tenant} is used up: {per_minute}. Try again in {wait_s:.1f} s."
        headers = self._describe(quotas) | say_when(wait_s)
        return Decision(False, headers, 429, "rate_limit_exceeded", message)

    def _wait_s(self, quota: _Quota) -> float:
        """Seconds until the cost fits if nobody takes anything before; infinity if it never does."""
        room = quota.item.amount - quota.cost
        if room < 0:
            return math.inf
        key = quota.item.key_for(quota.tenant)
        before, before_left_s, current, current_left_s = self._storage.get_sliding_window(key, WINDOW_S)
        if current <= room:  # then it is the window before that is in the way; its part shrinks steadily
            return before_left_s - (room - current) * WINDOW_S / before if before else 0.0
        return current_left_s - WINDOW_S + WINDOW_S * (1 - room / current)

    def _describe(self, quotas: list[_Quota]) -> dict[str, str]:
        headers = {}
        for quota in quotas:
            key = quota.item.key_for(quota.tenant)
            before, before_left_s, current, current_left_s = self._storage.get_sliding_window(key, WINDOW_S)
            used = math.floor(before * before_left_s / WINDOW_S + current)
            reset_s = current_left_s if current else before_left_s
            headers[f"x-ratelimit-limit-{quota.what}"] = str(quota.item.amount)
            headers[f"x-ratelimit-remaining-{quota.what}"] = str(max(0, quota.item.amount - used))
            headers[f"x-ratelimit-reset-{quota.what}"] = format_duration(reset_s)
        return headers


def format_duration(seconds: float) -> str:
    """As OpenAI's headers have it: 250ms, 6.3s, 1m30s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s"


def _find_quotas(ticket: Ticket) -> list[_Quota]:
    quotas = []
    if ticket.requests_per_minute:
        quotas.append(_Quota("requests", _build_item("requests", ticket.requests_per_minute), ticket.tenant, 1))
    if ticket.tokens_per_minute:
        item = _build_item("tokens", ticket.tokens_per_minute)
        quotas.append(_Quota("tokens", item, ticket.tenant, ticket.cost_tokens))
    return quotas


@lru_cache(maxsize=1024)
def _build_item(what: str, amount: int) -> RateLimitItem:
    return RateLimitItemPerMinute(amount, namespace=what)
