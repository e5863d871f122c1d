"""Requests and tokens per minute: what fits, what the headers say, and when a refused request would fit."""

import limits.storage.memory
import pytest

from swiftkv.serving.gateway import quotas as quotas_module
from swiftkv.serving.gateway.quotas import Quotas, format_duration


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000_000_020.0  # 0 s into a window of the counter

    def time(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(limits.storage.memory, "time", clock)
    monkeypatch.setattr(quotas_module, "time", clock)
    return clock


@pytest.fixture
def quotas(clock):
    return Quotas()


def test_without_limits_everything_fits_and_no_header_is_sent(quotas, make_ticket):
    for _ in range(1000):
        decision = quotas.take(make_ticket(prompt_tokens=10**9))
        assert decision.is_granted
        assert decision.headers == {}


def test_requests_per_minute_hold_and_the_headers_count_down(quotas, make_ticket):
    decisions = [quotas.take(make_ticket(requests_per_minute=3)) for _ in range(5)]
    assert [decision.is_granted for decision in decisions] == [True, True, True, False, False]
    assert [decision.headers["x-ratelimit-remaining-requests"] for decision in decisions[:4]] == ["2", "1", "0", "0"]
    assert decisions[0].headers["x-ratelimit-limit-requests"] == "3"
    refused = decisions[3]
    assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
    assert "a" in refused.message and "3 requests per minute" in refused.message


@pytest.mark.parametrize("seconds_later", [0, 17, 45, 61])
def test_after_retry_after_the_request_fits_and_not_long_before(quotas, clock, make_ticket, seconds_later):
    ticket = make_ticket(prompt_tokens=300, tokens_per_minute=1000)
    for _ in range(3):
        assert quotas.take(ticket).is_granted
    clock.now_s += seconds_later
    decision = quotas.take(ticket)
    if decision.is_granted:
        decision = quotas.take(ticket)
    wait_s = int(decision.headers["Retry-After"])
    clock.now_s += wait_s - 1.5
    assert wait_s <= 1 or not quotas.take(ticket).is_granted
    clock.now_s += 1.5
    assert quotas.take(ticket).is_granted


def test_over_any_minute_no_more_is_taken_than_the_limit_on_average(quotas, clock, make_ticket):
    taken = 0
    for _ in range(600):
        clock.now_s += 1
        taken += quotas.take(make_ticket(prompt_tokens=50, tokens_per_minute=1000)).is_granted * 50
    assert taken <= 11 * 1000
    assert taken >= 9 * 1000


def test_larger_than_the_whole_quota_is_refused_without_a_time(quotas, make_ticket):
    decision = quotas.take(make_ticket(prompt_tokens=2000, tokens_per_minute=1000))
    assert not decision.is_granted
    assert "Retry-After" not in decision.headers
    assert "larger than the whole quota" in decision.message


def test_usage_replaces_the_estimate_in_both_directions(quotas, make_ticket):
    ticket = make_ticket(prompt_tokens=100, output_tokens=400, tokens_per_minute=1000)
    quotas.take(ticket)
    quotas.correct(ticket, 120)
    assert quotas.take(ticket).headers["x-ratelimit-remaining-tokens"] == "380"
    quotas.correct(ticket, 900)
    assert not quotas.take(make_ticket(prompt_tokens=1, tokens_per_minute=1000)).is_granted


def test_refused_for_tokens_takes_no_request(quotas, make_ticket):
    quotas.take(make_ticket(prompt_tokens=5000, requests_per_minute=2, tokens_per_minute=1000))
    decision = quotas.take(make_ticket(prompt_tokens=1, requests_per_minute=2, tokens_per_minute=1000))
    assert decision.headers["x-ratelimit-remaining-requests"] == "1"


def test_what_is_given_back_can_be_taken_again(quotas, make_ticket):
    ticket = make_ticket(prompt_tokens=1000, requests_per_minute=1, tokens_per_minute=1000)
    for _ in range(3):
        assert quotas.take(ticket).is_granted
        quotas.give_back(ticket)


def test_tenants_do_not_share_a_counter(quotas, make_ticket):
    assert quotas.take(make_ticket("a", requests_per_minute=1)).is_granted
    assert quotas.take(make_ticket("b", requests_per_minute=1)).is_granted
    assert not quotas.take(make_ticket("a", requests_per_minute=1)).is_granted


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.2501, "251ms"), (1, "1.0s"), (6.25, "6.2s"), (60, "1m0s"), (359.2, "6m0s")]
)
def test_durations_are_written_as_openai_writes_them(seconds, text):
    assert format_duration(seconds) == text
