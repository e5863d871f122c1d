"""Where a prompt is prefilled: the lines that are measured, the decision, and what is taken as seen."""

import math

import pytest

from swiftkv.serving.config import HopSettings
from swiftkv.serving.hop import Beginnings, FadingLine, HopCosts, SeenPrefixes


def build_line(base: float, per_token: float) -> FadingLine:
    line = FadingLine()
    for tokens in (100, 2000, 400, 1000):
        line.add(tokens, base + per_token * tokens)
    return line


def build_costs(**settings) -> HopCosts:
    """Remote: 30 ms and 0.5 ms a token; transfer: 20 ms and 0.1 ms a token; here: 1 ms a token."""
    lines = {
        "remote": build_line(0.03, 0.0005),
        "transfer": build_line(0.02, 0.0001),
        "local": build_line(0.0, 0.001),
    }
    return HopCosts(HopSettings(**settings), **lines)


def test_a_line_is_found_from_its_points():
    line = build_line(0.05, 0.001)
    assert line.predict(5000) == pytest.approx(5.05)
    assert line.predict(0) == pytest.approx(0.05)


def test_points_of_one_length_are_taken_in_proportion():
    line = FadingLine()
    for _ in range(3):
        line.add(200, 0.4)
    assert line.predict(100) == pytest.approx(0.2)


def test_old_points_fade():
    line = FadingLine()
    for seconds, repeats in ((10.0, 50), (1.0, 50)):
        for _ in range(repeats):
            line.add(100, seconds)
    assert line.predict(100) == pytest.approx(1.0, rel=0.1)


def test_a_line_never_falls_in_the_tokens_nor_below_zero():
    line = FadingLine()
    for tokens, seconds in ((100, 2.0), (1000, 1.0), (50, 3.0)):
        line.add(tokens, seconds)
    assert 0 <= line.predict(0) <= line.predict(10_000)


def test_break_even_is_where_both_ways_cost_the_same():
    costs = build_costs()
    # 0.05 + 0.0006 n = 0.001 n
    assert costs.find_break_even(0, 0) == pytest.approx(125, abs=1)
    assert not costs.choose_remote(120, 0, 0) and costs.choose_remote(130, 0, 0)


def test_each_stream_that_would_wait_makes_the_hop_pay_sooner():
    # 0.05 + 0.0006 n = 0.005 n
    assert build_costs().find_break_even(4, 0) == pytest.approx(0.05 / 0.0044, abs=1)


def test_a_queue_here_makes_the_hop_pay_sooner():
    costs = build_costs()
    assert costs.find_break_even(0, 40) < costs.find_break_even(0, 0)


def test_a_hop_that_never_pays_has_no_break_even():
    costs = build_costs()
    costs.remote = build_line(0.03, 0.002)
    assert costs.find_break_even(0, 0) == math.inf


def test_before_anything_was_measured_a_given_length_decides():
    costs = HopCosts(HopSettings(min_tokens_unmeasured=64))
    assert [costs.choose_remote(tokens, 0, 0) for tokens in (63, 64)] == [False, True]


def test_a_given_length_decides_always():
    costs = build_costs(min_tokens=1000)
    assert [costs.choose_remote(tokens, 100, 0) for tokens in (999, 1000)] == [False, True]


def test_seen_prefixes_are_counted_in_whole_pieces_and_only_from_the_start():
    seen = SeenPrefixes(10_000)
    text = "".join(str(number) for number in range(2000))
    seen.add(text[:1000])
    assert seen.count_seen(text) == 768
    assert seen.count_seen("x" + text) == 0


def test_seen_prefixes_forget_the_least_recent():
    seen = SeenPrefixes(512)
    first, second = "a" * 256, "b" * 512
    seen.add(first)
    seen.add(second)
    assert (seen.count_seen(first), seen.count_seen(second)) == (0, 512)


def test_a_queue_makes_a_pool_asked_less_and_not_needed_less():
    costs = HopCosts(HopSettings())
    for tokens in (200, 400, 800, 1600):
        costs.local.add(tokens, tokens / 1000)
        costs.transfer.add(tokens, 0.01)
        costs.add_remote(tokens, tokens / 4000)
    assert costs.choose_remote(800, 0, 0) and costs.is_for_prefill_pool(800, 0, 0)
    for tokens in (200, 400, 800, 1600) * 8:
        costs.add_remote(tokens, 5 + tokens / 4000)
    assert not costs.choose_remote(800, 0, 0)
    assert costs.is_for_prefill_pool(800, 0, 0)


def test_only_equal_salts_share_what_was_seen():
    seen = SeenPrefixes(10_000)
    seen.add("a" * 1000, "one")
    assert (seen.count_seen("a" * 1000, "one"), seen.count_seen("a" * 1000, "two"), seen.count_seen("a" * 1000)) == (
        768,
        0,
        0,
    )
    beginnings = Beginnings()
    with beginnings.hold("a" * 2000, "one") as one, beginnings.hold("a" * 2000, "two") as two:
        assert one and two and one != two
