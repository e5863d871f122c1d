"""How long requests are: a bounded histogram of what arrived and what finished in a time.

Bounded, because each replica sends it: buckets by uncached prompt tokens, a factor of √2 apart, each with sums. So the
mean of every bucket is exact, and a percentile within a fifth.
Called by: serving/policy, and the serving replicas through `stats`.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

EDGES: tuple[int, ...] = tuple(round(64 * 2 ** (step / 2)) for step in range(23))
"""Largest number of uncached prompt tokens of each bucket but the last, which has no limit: 64 to 131,072."""


class Bucket(NamedTuple):
    """Sums over the requests of one bucket. Those that arrived and those that finished are not the same ones."""

    requests: float = 0
    """Requests that arrived."""
    uncached_tokens: float = 0
    """Their prompt tokens that a prefill replica would have to compute."""
    prompt_tokens: float = 0
    """All of their prompt tokens: what they will occupy in KV."""
    finished: float = 0
    """Requests that finished."""
    completion_tokens: float = 0
    """Their completion tokens."""
    completion_tokens_squared: float = 0
    """Sum of the squares of their completion tokens."""


def find_bucket(uncached_tokens: float) -> int:
    """Index of the bucket of a prompt."""
    return bisect_left(EDGES, uncached_tokens)


@dataclass(frozen=True)
class Lengths:
    """A histogram. Buckets that hold nothing may be left out."""

    buckets: Mapping[int, Bucket] = field(default_factory=dict)

    @classmethod
    def of_requests(cls, requests: Iterable[tuple[float, float]]) -> "Lengths":
        """The histogram of (uncached prompt tokens, completion tokens), all arrived and finished."""
        found: dict[int, list[float]] = {}
        for uncached, completion in requests:
            sums = found.setdefault(find_bucket(uncached), [0.0] * len(Bucket._fields))
            for index, value in enumerate((1, uncached, uncached, 1, completion, completion**2)):
                sums[index] += value
        return cls({index: Bucket(*sums) for index, sums in found.items()})

    @classmethod
    def sum(cls, parts: Iterable["Lengths"]) -> "Lengths":
        """All of them together."""
        found: dict[int, Bucket] = {}
        for part in parts:
            for index, bucket in part.buckets.items():
                found[index] = _add(found[index], bucket) if index in found else bucket
        return cls(found)

    @property
    def total(self) -> Bucket:
        """Sums over all buckets."""
        total = Bucket()
        for bucket in self.buckets.values():
            total = _add(total, bucket)
        return total

    @property
    def uncached_tokens_squared(self) -> float:
        """Sum of the squares of uncached prompt tokens, each prompt taken as its bucket's mean."""
        return sum(b.uncached_tokens**2 / b.requests for b in self.buckets.values() if b.requests > 0)

    def arrived(self) -> Iterator[Bucket]:
        """The buckets in which something arrived, shortest prompts first."""
        return (self.buckets[index] for index in sorted(self.buckets) if self.buckets[index].requests > 0)

    def to_json(self) -> dict[str, list[float]]:
        """For `from_json`."""
        return {str(index): list(bucket) for index, bucket in self.buckets.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Iterable[float]]) -> "Lengths":
        """What `to_json` made."""
        return cls({int(index): Bucket(*sums) for index, sums in values.items()})


def _add(left: Bucket, right: Bucket) -> Bucket:
    return Bucket(*(a + b for a, b in zip(left, right, strict=True)))


def is_finite(bucket: Bucket) -> bool:
    """Whether all sums are numbers of something."""
    return all(math.isfinite(value) and value >= 0 for value in bucket)
