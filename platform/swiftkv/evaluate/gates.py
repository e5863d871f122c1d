"""Gates: limits that a version's figures must keep before it may be promoted.

Measures nothing and moves no alias (registry/registry.py).
Called by: cli/evaluate.py.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from swiftkv.config import StrictModel
from swiftkv.registry.evaluations import GateResult, LimitResult


class Limit(StrictModel):
    """What one figure must keep; exactly one of the limits is given."""

    figure: str
    """Of the evaluation: keys joined by dots, such as student_after.kl_nats or tasks.gsm8k.student.exact_match."""
    of: str | None = None
    """The teacher's figure, for the limits that compare."""
    at_most: float | None = None
    """Greatest value allowed."""
    at_least: float | None = None
    """Smallest value allowed."""
    lost_points_at_most: float | None = None
    """Greatest 100 × (`of` - figure) allowed, of scores between 0 and 1."""
    ratio_at_most: float | None = None
    """Greatest figure / `of` allowed, as of perplexities."""

    @model_validator(mode="after")
    def _one_limit(self) -> "Limit":
        given = [name for name in ("at_most", "at_least", "lost_points_at_most", "ratio_at_most") if self._has(name)]
        if len(given) != 1:
            raise ValueError(
                "give exactly one of at_most, at_least, lost_points_at_most and ratio_at_most; "
                f"given: {', '.join(given) or 'none'}"
            )
        compares = given[0] in ("lost_points_at_most", "ratio_at_most")
        if compares != (self.of is not None):
            raise ValueError(f"{given[0]} {'needs' if compares else 'does not take'} `of`, the teacher's figure")
        return self

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None

    def check(self, figures: Mapping[str, Any]) -> LimitResult:
        """Whether the figures keep it; a figure that is absent or no number does not.

        Nor does a task's figure beside that of a teacher which is quantised otherwise: their difference would be that
        of the quantisations as well.
        """
        value, other = _find(figures, self.figure), _find(figures, self.of) if self.of else 0.0
        found = None if value is None or other is None else self._compute(value, other)
        unequal = self._describe_unequal(figures)
        passed = found is not None and self._allows(found) and not unequal
        return LimitResult(limit=self.describe() + unequal, found=found, passed=passed)

    def _describe_unequal(self, figures: Mapping[str, Any]) -> str:
        quantisation = figures.get("quantisation")
        is_other_model = self.of is not None and re.fullmatch(r"tasks\.[^.]+\.teacher\..+", self.of)
        if not is_other_model or not isinstance(quantisation, Mapping):
            return ""
        student, teacher = quantisation.get("student"), quantisation.get("teacher")
        if student == teacher:
            return ""
        return f", at equal quantisation (student: {student}; teacher: {teacher})"

    def describe(self) -> str:
        """The limit in a line."""
        if self.at_least is not None:
            return f"{self.figure} at least {self.at_least:g}"
        if self.at_most is not None:
            return f"{self.figure} at most {self.at_most:g}"
        if self.lost_points_at_most is not None:
            return f"{self.figure} within {self.lost_points_at_most:g} points of {self.of}"
        return f"{self.figure} at most {self.ratio_at_most:g} times {self.of}"

    def _compute(self, value: float, other: float) -> float:
        if self.lost_points_at_most is not None:
            return 100 * (other - value)
        if self.ratio_at_most is not None:
            return value / other if other else math.inf
        return value

    def _allows(self, found: float) -> bool:
        if not math.isfinite(found):
            return False
        if self.at_least is not None:
            return found >= self.at_least
        limits = (self.at_most, self.lost_points_at_most, self.ratio_at_most)
        return found <= next(limit for limit in limits if limit is not None)


class Gate(StrictModel):
    """The limits that a version must keep, all of them."""

    name: str
    """Shown wherever its result is."""
    limits: list[Limit] = Field(min_length=1)

    def judge(self, figures: Mapping[str, Any]) -> GateResult:
        """How these figures do."""
        results = tuple(limit.check(figures) for limit in self.limits)
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        return GateResult(gate=self.name, sha256=digest, passed=all(r.passed for r in results), limits=results)


def _find(figures: Mapping[str, Any], path: str) -> float | None:
    value: Any = figures
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
