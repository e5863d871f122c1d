"""Where a true rate or ratio lies, given few observations: what makes 1 failure of 3 no proof and 30 of 90 one.

Called by: rollout/judgement.py.
Source: Wilson 1927 for one rate; Newcombe 1998 (method 10) for the difference of two, built from Wilson's bounds.
"""

import math

from swiftkv.serving.gateway.outcomes import Times

Interval = tuple[float, float]

MIN_TIMES = 8
"""Below, the spread of times is not known well enough to say anything."""


def bound_rate(hits: int, total: int, z: float) -> Interval:
    """Wilson's interval of a rate, `z` standard errors wide to both sides. Without observations: anything."""
    if total == 0:
        return 0.0, 1.0
    rate, z2 = hits / total, z * z
    middle = (rate + z2 / (2 * total)) / (1 + z2 / total)
    half = z / (1 + z2 / total) * math.sqrt(rate * (1 - rate) / total + z2 / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def bound_difference(hits: int, total: int, other_hits: int, other_total: int, z: float) -> Interval:
    """The interval of one rate less another."""
    if not total or not other_total:
        return -1.0, 1.0
    rate, other = hits / total, other_hits / other_total
    low, high = bound_rate(hits, total, z)
    other_low, other_high = bound_rate(other_hits, other_total, z)
    return (
        rate - other - math.hypot(rate - low, other_high - other),
        rate - other + math.hypot(high - rate, other - other_low),
    )


def bound_ratio(times: Times, others: Times, z: float) -> Interval:
    """The interval of the ratio of two geometric means, by the normal law of their logarithms."""
    if min(times.count, others.count) < MIN_TIMES:
        return 0.0, math.inf
    difference = times.total / times.count - others.total / others.count
    half = z * math.sqrt(_compute_error(times) + _compute_error(others))
    return math.exp(difference - half), math.exp(difference + half)


def _compute_error(times: Times) -> float:
    """The squared standard error of the mean of the logarithms."""
    spread = times.squares - times.total * times.total / times.count
    return max(0.0, spread) / (times.count - 1) / times.count
