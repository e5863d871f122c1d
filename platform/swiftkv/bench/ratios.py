"""A ratio of two things measured in turns: the median over the pairs, and how sure that is.

Called by: bench/pairs.py, bench/engine.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Ratio:
    """Median over the pairs with its bootstrap 95% interval."""

    median: float
    low: float
    high: float
    pairs: list[float]
    """The ratio of each pair, in the order measured."""

    def scale(self, factor: float) -> "Ratio":
        """The same ratio in another unit."""
        return Ratio(
            self.median * factor, self.low * factor, self.high * factor, [value * factor for value in self.pairs]
        )


def compute_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """The ratio of what was measured in turns; pair i is `numerators[i] / denominators[i]`.

    The interval holds the middle 95% of the medians of resamples, with replacement, of the pairs (fixed seed). A
    single pair has an interval of no width, which says nothing.
    Raises: ValueError if the two are of different lengths or empty.
    """
    return summarise_values([top / bottom for top, bottom in zip(numerators, denominators, strict=True)])


def summarise_values(values: Sequence[float]) -> Ratio:
    """The same for values that were computed from each pair in another way, such as differences.

    Raises: ValueError if there is none.
    """
    import numpy as np  # the command line's help reaches this module, and must not wait for it

    if not values:
        raise ValueError("no pairs were measured")
    pairs = np.array(values)
    chosen = np.random.default_rng(0).integers(0, len(pairs), (_RESAMPLES, len(pairs)))
    low, high = np.quantile(np.median(pairs[chosen], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(pairs)), float(low), float(high), [float(value) for value in pairs])
