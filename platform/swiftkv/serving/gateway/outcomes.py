"""What became of the requests at each version of a model: small records that add up over gateways.

Judges nothing (serving/rollout/judgement.py does). None of the records holds text of a prompt or an answer.
Called by: gateway/generation.py, gateway/comparing.py, gateway/admission_server.py, serving/rollout.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request that a version was asked, and that has ended. One whose client left first is none."""

    application: str
    is_failed: bool
    """Every status from 400 on: what clients do wrong hits all versions alike."""
    ttft_s: float | None = None
    """From asking the version; streamed requests only."""
    tpot_s: float | None = None
    """Per token after the first; of an answer sent whole, its whole time per token."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One prompt that this version and the stable one were both asked."""

    application: str
    is_same: bool


@dataclass(frozen=True, slots=True)
class Times:
    """Sums over the logarithms of times: enough for their geometric mean and its error, whatever their number."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, seconds: float | None) -> "Times":
        """With one more; None and 0 are none."""
        if not seconds or seconds <= 0:
            return self
        value = math.log(seconds)
        return Times(self.count + 1, self.total + value, self.squares + value * value)

    def minus(self, earlier: "Times") -> "Times":
        """Those that came since."""
        return Times(self.count - earlier.count, self.total - earlier.total, self.squares - earlier.squares)


@dataclass(frozen=True, slots=True)
class VersionCounts:
    """All outcomes of one version."""

    ended: int = 0
    failed: int = 0
    compared: int = 0
    agreed: int = 0
    ttft: Times = Times()
    tpot: Times = Times()

    def add(self, outcome: Outcome | Compared) -> "VersionCounts":
        """With one more."""
        if isinstance(outcome, Compared):
            agreed = self.agreed + outcome.is_same
            return VersionCounts(self.ended, self.failed, self.compared + 1, agreed, self.ttft, self.tpot)
        failed = self.failed + outcome.is_failed
        ttft, tpot = self.ttft.add(outcome.ttft_s), self.tpot.add(outcome.tpot_s)
        return VersionCounts(self.ended + 1, failed, self.compared, self.agreed, ttft, tpot)

    def minus(self, earlier: "VersionCounts") -> "VersionCounts":
        """What came since."""
        return VersionCounts(
            self.ended - earlier.ended,
            self.failed - earlier.failed,
            self.compared - earlier.compared,
            self.agreed - earlier.agreed,
            self.ttft.minus(earlier.ttft),
            self.tpot.minus(earlier.tpot),
        )


@dataclass(frozen=True, slots=True)
class VersionReport:
    """All versions over all gateways, by application."""

    epoch: str
    """Of the counting process: counts of two epochs have nothing to do with each other."""
    age_s: float
    """Since counting began, in seconds. Gateways tell what they hold within a lease of it."""
    counts: dict[str, VersionCounts] = field(default_factory=dict)
    in_flight: dict[str, int] = field(default_factory=dict)
    """Requests that gateways have not finished."""


def add_outcomes(counts: dict[str, VersionCounts], outcomes: Iterable[Outcome | Compared]) -> None:
    """Counts them where they belong."""
    for outcome in outcomes:
        counts[outcome.application] = counts.get(outcome.application, VersionCounts()).add(outcome)
