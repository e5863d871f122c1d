"""What replicas say they have in hand, against requests whose times are given."""

import pytest

from swiftkv.serving import workload as module
from swiftkv.serving.workload import DecodeWorkload, PrefillWorkload, Served


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_prompt_waits_here_until_its_first_token_unless_another_pool_prefills_it(clock):
    workload = DecodeWorkload(10_000)
    here, there = Served(300, 200, is_remote=False), Served(500, 500, is_remote=True)
    workload.begin(here)
    workload.begin(there)
    assert (workload.waiting_tokens, workload.num_running) == (200, 0)
    workload.take_chunk(here)
    assert (workload.waiting_tokens, workload.num_running) == (0, 1)
    workload.end(here)
    workload.end(there)
    assert workload.report()["requests_running"] == 0


def test_steps_are_counted_once_for_all_running_sequences(clock):
    workload = DecodeWorkload(10_000)
    sequences = [Served(100, 0, is_remote=True) for _ in range(3)]
    for served in sequences:
        workload.begin(served)
        workload.take_chunk(served)
    for _ in range(10):
        clock.now += 0.05
        for served in sequences:
            workload.take_chunk(served)
    report = workload.report()
    assert report["steps"] == pytest.approx(10, abs=1)
    assert report["steps_s"] / report["steps"] == pytest.approx(0.05, rel=0.1)
    assert report["step_sequences"] / report["steps"] == 3
    assert report["step_context_tokens"] / report["steps"] == pytest.approx(3 * 106, rel=0.05)
    assert report["kv_usage_frac"] == pytest.approx(3 * 111 / 10_000)


def test_only_prompts_that_hop_are_demand_for_prefill(clock):
    workload = DecodeWorkload(10_000)
    for served in (Served(300, 200, is_remote=False), Served(700, 700, is_remote=True)):
        workload.begin(served)
        workload.take_chunk(served, 20)
        workload.end(served)
    report = workload.report()
    uncached = sum(value for name, value in report.items() if name.startswith("uncached_tokens_le_"))
    finished = sum(value for name, value in report.items() if name.startswith("finished_le_"))
    completion = sum(value for name, value in report.items() if name.startswith("completion_tokens_le_"))
    assert (uncached, finished, completion) == (700, 2, 40)


def test_a_prefill_replica_s_time_is_split_by_what_its_engine_does(clock):
    woken = []
    workload = PrefillWorkload(30, lambda: woken.append(clock.now))
    workload.begin(400)
    workload.begin(100)
    assert workload.report()["queued_prompt_tokens"] == 500
    for doing, seconds in (("computing", 2), ("waiting", 3), ("computing", 1), ("exporting", 4)):
        clock.now += seconds
        workload.spend(doing, seconds)
    workload.end(400, computed_tokens=380, held_tokens=410)
    workload.end(100)
    workload.begin(50)
    workload.end(50, computed_tokens=50, held_tokens=50)
    report = workload.report(kv_usage_frac=0.5)
    assert (report["computing_s"], report["waiting_for_decode_s"], report["exporting_s"]) == (3, 3, 4)
    assert (report["computed_prompt_tokens"], report["pending_kv_tokens"], report["kv_usage_frac"]) == (430, 460, 0.5)
    assert woken == [1000, 1010], "only a prompt that finds none wakes the engine"


def test_kv_is_kept_for_its_lease_and_forgotten_though_nobody_asks(clock):
    workload = PrefillWorkload(lease_s=30)
    assert workload.last_lease_s == 0
    workload.begin(400)
    workload.end(400, held_tokens=400)
    clock.now += 10
    assert workload.last_lease_s == pytest.approx(20)
    assert workload.report()["pending_kv_tokens"] == 400
    clock.now += 21
    assert (workload.report()["pending_kv_tokens"], workload.last_lease_s) == (0, 0)
    for _ in range(1000):
        clock.now += 1
        workload.begin(1)
        workload.end(1, held_tokens=1)
    assert len(workload._handed_out) <= 30, "without an autoscaled pool nobody asks for a report"


def test_answers_sent_whole_run_from_when_the_engine_has_begun_them(clock):
    workload = DecodeWorkload(10_000)
    whole = Served(300, 200, is_remote=False, request_id="a", is_streamed=False)
    streamed = Served(100, 100, is_remote=False, request_id="b")
    for served in (whole, streamed):
        workload.begin(served)
    assert workload.list_unseen() == ["a"]
    workload.take_chunk(streamed)
    workload.note_begun({"a", "other"})
    assert (workload.waiting_tokens, workload.num_running, workload.list_unseen()) == (0, 2, [])
    for _ in range(4):
        clock.now += 0.5
        workload.take_chunk(streamed)
    report = workload.report()
    assert (report["steps"], report["steps_s"], report["step_sequences"]) == (4, 2, 8), "both are in every step"
    assert workload.report(kv_usage_frac=0.25)["kv_usage_frac"] == 0.25, "the engine knows better"
    workload.take_chunk(whole, 60)
    for served in (whole, streamed):
        workload.end(served)
    assert workload.report()["requests_running"] == 0


def test_what_a_pool_would_take_if_it_were_well_is_its_demand(clock):
    workload = DecodeWorkload(10_000)
    workload.begin(Served(700, 600, is_remote=False, is_for_prefill_pool=True))
    report = workload.report()
    assert sum(value for name, value in report.items() if name.startswith("uncached_tokens_le_")) == 600
    assert report["queued_prompt_tokens"] == 600, "it is prefilled here all the same"


def test_requests_of_equal_size_are_told_apart(clock):
    workload = DecodeWorkload(10_000)
    first, second = Served(300, 200, is_remote=False), Served(300, 200, is_remote=False)
    workload.begin(first)
    workload.begin(second)
    for served in (second, first):
        workload.take_chunk(served)
    for served in (second, first):
        workload.end(served)
    assert (workload.num_running, workload.waiting_tokens) == (0, 0)
