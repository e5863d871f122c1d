"""Whether a new version is switched to, dropped, or watched on: a pure function of counts.

A version is dropped as soon as it is clearly worse, and switched to once enough was seen and nothing of it looks worse.
What looks worse without being so clearly is watched until patience ends, and then dropped.
Called by: rollout/rollout.py. Calls: rollout/bounds.py.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from swiftkv.serving.gateway.outcomes import Times, VersionCounts
from swiftkv.serving.rollout.bounds import Interval, bound_difference, bound_rate, bound_ratio
from swiftkv.serving.rollout.settings import RolloutSettings

Z = 3.0
"""Standard errors that make it clear: counts are looked at again and again, and each look may be the unlucky one."""

MIN_SEEN = 5
"""Requests or comparisons below which no rate is clearly worse: Wilson's interval is too narrow for so few."""


@dataclass(frozen=True)
class Observation:
    """What was seen of both versions in the same time."""

    stable: VersionCounts
    candidate: VersionCounts
    in_flight: int
    """The candidate's requests that have not ended."""
    watched_s: float


@dataclass(frozen=True)
class Check:
    """One figure against its bound."""

    name: str
    value: float | None
    """None: nothing was seen."""
    bound: float
    is_clearly_worse: bool

    @property
    def looks_worse(self) -> bool:
        """By its plain value."""
        if self.value is None:
            return False
        return self.value < self.bound if self.name == "agreement" else self.value > self.bound

    def describe(self) -> str:
        """For people."""
        value = "not seen" if self.value is None else f"{self.value:.3f}"
        return f"{self.name} {value} (bound {self.bound:g})"


@dataclass(frozen=True)
class Verdict:
    """What is to be done, and why."""

    action: Literal["switch", "drop", "wait"]
    reason: Literal["good", "quiet", "error_rate", "ttft", "tpot", "agreement", "stuck", "too_few"]
    checks: tuple[Check, ...]


def judge(seen: Observation, settings: RolloutSettings) -> Verdict:
    """The verdict on the candidate."""
    checks = tuple(_build_checks(seen, settings))
    for check in checks:
        if check.is_clearly_worse:
            return _decide("drop", check.name, checks)
    is_over = seen.watched_s >= settings.patience_s
    compares = settings.compared_frac > 0 and settings.bounds.min_agreement_frac is not None
    has_enough = seen.candidate.ended >= settings.min_requests and (
        not compares or seen.candidate.compared >= settings.min_compared
    )
    if not has_enough and not is_over:
        return _decide("wait", "too_few", checks)
    if seen.in_flight > seen.candidate.ended:
        return _decide("drop" if is_over else "wait", "stuck", checks)
    for check in checks:
        if check.looks_worse:
            return _decide("drop" if is_over else "wait", check.name, checks)
    return _decide("switch", "good" if has_enough else "quiet", checks)


def _decide(action: str, reason: str, checks: tuple[Check, ...]) -> Verdict:
    return Verdict(action, reason, checks)  # type: ignore[arg-type]


def _build_checks(seen: Observation, settings: RolloutSettings) -> Iterator[Check]:
    new, old, bounds = seen.candidate, seen.stable, settings.bounds
    if (bound := bounds.max_error_increase_frac) is not None:
        value = _divide(new.failed, new.ended)
        increase = None if value is None else value - (_divide(old.failed, old.ended) or 0.0)
        interval = bound_difference(new.failed, new.ended, old.failed, old.ended, Z)
        yield Check("error_rate", increase, bound, new.ended >= MIN_SEEN and interval[0] > bound)
    for name, bound, times, others in (
        ("ttft", bounds.max_ttft_ratio, new.ttft, old.ttft),
        ("tpot", bounds.max_tpot_ratio, new.tpot, old.tpot),
    ):
        if bound is not None:
            yield _check_ratio(name, bound, times, others, bound_ratio(times, others, Z))
    if (bound := bounds.min_agreement_frac) is not None:
        interval = bound_rate(new.agreed, new.compared, Z)
        yield Check(
            "agreement", _divide(new.agreed, new.compared), bound, new.compared >= MIN_SEEN and interval[1] < bound
        )


def _check_ratio(name: str, bound: float, times: Times, others: Times, interval: Interval) -> Check:
    has_both = times.count and others.count
    value = math.exp(times.total / times.count - others.total / others.count) if has_both else None
    return Check(name, value, bound, interval[0] > bound)


def _divide(part: int, whole: int) -> float | None:
    return part / whole if whole else None
