"""Divides a number of devices between the pools when both cannot have what they need.

The division is the one whose worse pool is least overloaded, overload being replicas needed over replicas given:
devices move from a pool that has them to the one that lacks them. A division that is nearly as good stays.
Called by: serving/policy/decision.py.
"""

import math
from dataclasses import dataclass

STAY_FRAC = 0.1
"""By how much the worst overload must improve before devices move."""


@dataclass(frozen=True)
class Claim:
    """What one pool asks of the budget."""

    needed: int
    """Replicas the demand needs now."""
    wanted: int
    """Replicas it would have otherwise: `needed` or more, when a scale-down is still delayed."""
    least: int
    """Replicas it cannot be below: its minimum, or those that may not be drained."""
    current: int
    """Replicas it has."""
    devices: int
    """Devices per replica."""


def divide(prefill: Claim, decode: Claim, budget: int | None) -> tuple[int, int]:
    """Replicas of the prefill pool and the decode pool, within the budget.

    More than the budget comes out only where `least` of both is more already, as when the budget was lowered.
    """
    if budget is None or _devices(prefill, decode, prefill.wanted, decode.wanted) <= budget:
        return prefill.wanted, decode.wanted
    needs = max(prefill.needed, prefill.least), max(decode.needed, decode.least)
    if _devices(prefill, decode, *needs) <= budget:
        return _hand_out(prefill, decode, needs, budget)
    best, best_overload = (prefill.least, decode.least), math.inf
    for replicas in range(prefill.least, needs[0] + 1):
        left = (budget - replicas * prefill.devices) // decode.devices
        if left < decode.least:
            break
        split = replicas, min(left, needs[1])
        overload = _overload(prefill, decode, split)
        if (overload, _moves(prefill, decode, split)) < (best_overload, _moves(prefill, decode, best)):
            best, best_overload = split, overload
    return _stay(prefill, decode, needs, budget, best, best_overload)


def _hand_out(prefill: Claim, decode: Claim, needs: tuple[int, int], budget: int) -> tuple[int, int]:
    """What is left over goes to the pools whose scale-down is only delayed."""
    left = budget - _devices(prefill, decode, *needs)
    more = min(prefill.wanted - needs[0], left // prefill.devices)
    left -= more * prefill.devices
    return needs[0] + more, needs[1] + min(decode.wanted - needs[1], left // decode.devices)


def _stay(
    prefill: Claim, decode: Claim, needs: tuple[int, int], budget: int, best: tuple[int, int], overload: float
) -> tuple[int, int]:
    now = min(prefill.current, needs[0]), min(decode.current, needs[1])
    is_allowed = now[0] >= prefill.least and now[1] >= decode.least
    free = budget - _devices(prefill, decode, *now)
    if is_allowed and 0 <= free < min(prefill.devices, decode.devices):
        if _overload(prefill, decode, now) <= (1 + STAY_FRAC) * overload:
            return now
    return best


def _devices(prefill: Claim, decode: Claim, num_prefill: int, num_decode: int) -> int:
    return num_prefill * prefill.devices + num_decode * decode.devices


def _overload(prefill: Claim, decode: Claim, split: tuple[int, int]) -> float:
    # Decode replicas can prefill too, so a pool of no prefill replicas is bad, and one of no decode replicas useless.
    worst_decode = decode.needed / split[1] if split[1] else (math.inf if decode.needed else 0.0)
    return max(prefill.needed / max(split[0], 0.5), worst_decode)


def _moves(prefill: Claim, decode: Claim, split: tuple[int, int]) -> int:
    return abs(split[0] - prefill.current) + abs(split[1] - decode.current)
