"""When a new version is switched to, dropped or watched on, and the bounds that few observations leave."""

import math
import random

import pytest

from swiftkv.serving.gateway.outcomes import Outcome, Times, VersionCounts
from swiftkv.serving.rollout.bounds import bound_difference, bound_rate, bound_ratio
from swiftkv.serving.rollout.judgement import Observation, judge
from swiftkv.serving.rollout.settings import Bounds, RolloutSettings

SETTINGS = RolloutSettings(model="tiny", min_requests=50, min_compared=10, patience_s=600)


def build_counts(ended, failed=0, ttft_s=0.1, tpot_s=0.02, compared=0, agreed=0, seed=0):
    """Counts whose times are spread by about a third around what is given."""
    draw = random.Random(seed)
    counts = VersionCounts(compared=compared, agreed=agreed)
    for number in range(ended):
        spread = math.exp(draw.gauss(0, 0.3))
        is_failed = number < failed
        times = (None, None) if is_failed else (ttft_s * spread, tpot_s * spread)
        counts = counts.add(Outcome("tiny@2", is_failed, *times))
    return counts


def decide(candidate, stable=None, settings=SETTINGS, in_flight=0, watched_s=60.0):
    seen = Observation(stable or build_counts(500, seed=1), candidate, in_flight, watched_s)
    verdict = judge(seen, settings)
    return verdict.action, verdict.reason


# Verdicts.


def test_version_as_good_as_the_stable_one_is_switched_to():
    assert decide(build_counts(60, compared=12, agreed=11)) == ("switch", "good")


@pytest.mark.parametrize(
    ("worse", "reason"),
    [
        ({"failed": 12}, "error_rate"),
        ({"ttft_s": 0.25}, "ttft"),
        ({"tpot_s": 0.05}, "tpot"),
        ({"compared": 40, "agreed": 3}, "agreement"),
    ],
)
def test_clearly_worse_version_is_dropped_at_once(worse, reason):
    assert decide(build_counts(45, **worse)) == ("drop", reason)


def test_version_that_fails_always_is_dropped_after_a_handful():
    assert decide(build_counts(4, failed=4))[0] == "wait"
    assert decide(build_counts(5, failed=5)) == ("drop", "error_rate")


def test_one_failure_among_few_is_no_proof():
    assert decide(build_counts(10, failed=1))[0] == "wait"
    # Neither clearly worse nor as good: watched on, and dropped when patience ends.
    assert decide(build_counts(60, failed=3, compared=12, agreed=12)) == ("wait", "error_rate")
    assert decide(build_counts(60, failed=3, compared=12, agreed=12), watched_s=601) == ("drop", "error_rate")


def test_failures_that_the_stable_version_has_too_are_not_held_against_it():
    stable = build_counts(500, failed=100, seed=1)
    assert decide(build_counts(60, failed=12, compared=12, agreed=12), stable) == ("switch", "good")


def test_too_few_requests_or_comparisons_are_waited_for_until_patience_ends():
    assert decide(build_counts(49, compared=12, agreed=12)) == ("wait", "too_few")
    assert decide(build_counts(60, compared=9, agreed=9)) == ("wait", "too_few")
    assert decide(build_counts(0), build_counts(0), watched_s=601) == ("switch", "quiet")


def test_version_that_does_not_finish_its_requests_is_dropped():
    assert decide(build_counts(3), in_flight=30)[0] == "wait"
    assert decide(build_counts(3), in_flight=30, watched_s=601) == ("drop", "stuck")


def test_bounds_that_are_none_are_not_looked_at():
    nothing = Bounds(max_error_increase_frac=None, max_ttft_ratio=None, max_tpot_ratio=None, min_agreement_frac=None)
    settings = SETTINGS.model_copy(update={"bounds": nothing})
    assert decide(build_counts(60, failed=50, ttft_s=9, tpot_s=9), settings=settings) == ("switch", "good")


def test_equal_versions_are_seldom_dropped_however_often_one_looks():
    """Both fail at 2% and are as fast; looked at after every request. Almost 3 standard errors make it clear."""
    dropped = 0
    for seed in range(100):
        draw = random.Random(seed)
        stable = candidate = VersionCounts(compared=20, agreed=20)
        for _ in range(150):
            for share in (0, 1):
                for _ in range(1 if share else 9):
                    outcome = Outcome(
                        "", draw.random() < 0.02, draw.lognormvariate(-2, 0.5), draw.lognormvariate(-4, 0.3)
                    )
                    stable, candidate = (stable, candidate.add(outcome)) if share else (stable.add(outcome), candidate)
            if decide(candidate, stable)[0] == "drop":
                dropped += 1
                break
    assert dropped <= 3


# Bounds.


def test_wilson_s_interval_is_the_published_one():
    # Newcombe 1998, table I: 81 of 263 and 1 of 29, at 95%.
    assert bound_rate(81, 263, 1.959964) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert bound_rate(1, 29, 1.959964) == pytest.approx((0.0061, 0.1718), abs=1e-4)
    assert bound_rate(0, 0, 3) == (0, 1)


def test_newcombe_s_difference_is_the_published_one():
    # Newcombe 1998 (differences), table II, method 10: 56/70 and 48/80; 10/10 and 0/10.
    assert bound_difference(56, 70, 48, 80, 1.959964) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert bound_difference(10, 10, 0, 10, 1.959964) == pytest.approx((0.6075, 1.0), abs=1e-4)


def test_ratio_holds_the_true_one_and_narrows_with_more_times():
    def collect(number, seconds, seed):
        draw, times = random.Random(seed), Times()
        for _ in range(number):
            times = times.add(seconds * math.exp(draw.gauss(0, 0.4)))
        return times

    few = bound_ratio(collect(10, 0.2, 1), collect(100, 0.1, 2), 3)
    many = bound_ratio(collect(1000, 0.2, 1), collect(1000, 0.1, 2), 3)
    assert few[0] < many[0] < 2 < many[1] < few[1]
    assert bound_ratio(collect(7, 9, 1), collect(100, 0.1, 2), 3) == (0, math.inf)
