"""Ratios of pairs and their intervals."""

import numpy as np
import pytest

from swiftkv.bench.ratios import compute_ratio


def test_the_ratio_is_that_of_each_pair_and_not_of_the_medians() -> None:
    ratio = compute_ratio([2.0, 30.0, 400.0], [1.0, 10.0, 100.0])
    assert ratio.pairs == [2.0, 3.0, 4.0] and ratio.median == 3.0


def test_the_interval_covers_the_true_median_about_19_times_in_20() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        ratio = compute_ratio(generator.normal(2.0, 0.1, 15), np.ones(15))
        covered += ratio.low <= 2.0 <= ratio.high
    assert 0.90 <= covered / 300 <= 0.99


def test_equal_pairs_have_an_interval_of_no_width_and_outliers_widen_it() -> None:
    assert compute_ratio([1.5] * 5, [1.0] * 5).low == compute_ratio([1.5] * 5, [1.0] * 5).high == 1.5
    wide = compute_ratio([1.5, 1.5, 3.0, 1.5, 0.5], [1.0] * 5)
    assert wide.low < wide.median == 1.5 < wide.high


def test_a_scaled_ratio_is_scaled_whole() -> None:
    ratio = compute_ratio([2.0, 3.0], [1.0, 1.0])
    assert ratio.scale(0.5).pairs == [1.0, 1.5] and ratio.scale(0.5).high == ratio.high / 2


@pytest.mark.parametrize(("numerators", "denominators"), [([], []), ([1.0], [])])
def test_nothing_measured_is_an_error(numerators: list[float], denominators: list[float]) -> None:
    with pytest.raises(ValueError):
        compute_ratio(numerators, denominators)
