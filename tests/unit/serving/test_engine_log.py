"""How an engine's time is split by what vLLM says after each step."""

from importlib import metadata

import pytest
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from swiftkv.errors import EngineError
from swiftkv.serving import engine_log as module
from swiftkv.serving.engine_log import EngineLog


@pytest.fixture
def log(monkeypatch):
    clock = iter(float(second) for second in range(100))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(EngineLog, "_of_process", None)
    return EngineLog(None)


def list_doings(log, *records):
    told = []
    log.listener = lambda doing, seconds: told.append((doing, seconds))
    for record in records:
        log.record(*record)
    return told


def build_step(prompt_tokens=0, new_tokens=0):
    step = IterationStats()
    step.prompt_token_stats.total, step.num_generation_tokens = prompt_tokens, new_tokens
    return step


@pytest.mark.parametrize(
    ("after", "step", "doing"),
    [
        (SchedulerStats(num_running_reqs=1, kv_cache_usage=0.5), None, "computing"),  # a chunk of a long prompt
        (SchedulerStats(kv_cache_usage=0.5), build_step(100, 1), "computing"),  # its last one
        (SchedulerStats(num_waiting_reqs=2, kv_cache_usage=0.9), None, "waiting"),
        (SchedulerStats(kv_cache_usage=0.1), None, "exporting"),
    ],
)
def test_what_the_time_since_the_last_step_went_to(log, after, step, doing):
    assert list_doings(log, (after, step)) == [(doing, 1.0)]
    assert log.kv_usage_frac == after.kv_cache_usage
    assert EngineLog.find() is log


def test_bytes_that_were_fetched_are_counted_step_by_step(log, monkeypatch):
    counted = []
    monkeypatch.setattr(module, "count", lambda name, amount: counted.append((name, amount)))
    for stats in (None, {"bytes_transferred": []}, {"bytes_transferred": [3, 4]}, {"of another connector": 1}):
        log.record(SchedulerStats(kv_connector_stats=stats), None)
    assert counted == [("swiftkv_kv_transfer_bytes_total", 7)]


def test_without_the_entry_point_a_replica_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(EngineLog, "_of_process", None)
    with pytest.raises(EngineError, match="make setup"):
        EngineLog.find()
    (found,) = metadata.entry_points(group="vllm.stat_logger_plugins", name="swiftkv")
    assert found.load() is EngineLog


def test_an_engine_that_holds_nothing_does_nothing(log):
    assert list_doings(log, (SchedulerStats(), None), (None, build_step(5))) == []


def test_the_time_before_a_prompt_came_is_nobody_s(log):
    for _ in range(10):
        module.time.monotonic()
    log.wake()
    assert list_doings(log, (SchedulerStats(num_running_reqs=1), None)) == [("computing", 1.0)]
