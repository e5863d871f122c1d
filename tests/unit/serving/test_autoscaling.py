"""The policy as Ray Serve calls it: from its own contexts, through its own wrapper, with its own state."""

import json
import logging
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import TinyShape, write_student
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.autoscaling_policy import PrometheusSample, PrometheusVector, _apply_app_level_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext
from ray.serve.schema import ServeApplicationSchema

from swiftkv.errors import ConfigError
from swiftkv.metrics import METRICS
from swiftkv.serving import autoscaling
from swiftkv.serving.autoscaling import (
    COMPLETION_TOKENS_QUERY,
    FINISHED_QUERY,
    PROMPT_TOKENS_QUERY,
    PROMPTS_QUERY,
    PoolPolicy,
    build_observation,
    convert_histogram,
    find_pools,
)
from swiftkv.serving.policy.reasons import CODES
from swiftkv.serving.policy.stats import ReplicaLog, build_replica_stats

PREFILL, DECODE = DeploymentID("Prefill:tiny", "app"), DeploymentID("Decode:tiny", "app")
GATEWAY = DeploymentID("gateway", "app")
SETTINGS: dict[str, Any] = {
    "targets": {"ttft_s": 2, "tpot_s": 0.05},
    "costs": {
        "prefill_s_per_token": 0.0002,
        "step_s": 0.02,
        "step_s_per_sequence": 0.001,
        "step_s_per_context_token": 5e-7,
        "kv_tokens": 100_000,
    },
    "prefill": {"min_replicas": 0, "max_replicas": 20},
    "decode": {"min_replicas": 0, "max_replicas": 20},
}
# The wiring that the adapter's text asks for.
AUTOSCALING_CONFIG = {
    "min_replicas": 0,
    "max_replicas": 20,
    "upscale_delay_s": 0,
    "downscale_delay_s": 0,
    "downscale_to_zero_delay_s": 0,
}
POLICY = {"policy_function": "swiftkv.serving.autoscaling:PoolPolicy", "policy_kwargs": {"settings": SETTINGS}}


def replica_stats(rate: float = 0, prompt: int = 1000, completion: int = 100, **fields: float) -> dict[str, float]:
    """What a replica reports at 1,000 s that took so many requests per second."""
    log = ReplicaLog(now_s=0)
    for index in range(round(30 * rate)):
        now_s = 970.01 + index / rate
        log.arrived(now_s, prompt, prompt)
        log.finished(now_s, prompt, completion)
    return build_replica_stats(log, 1000, **fields)


def context(
    deployment: DeploymentID,
    stats: list[dict[str, float] | None],
    target: int | None = None,
    queued: float = 0,
    state: dict[str, Any] | None = None,
    now_s: float = 1000,
    age_s: float = 3,
) -> AutoscalingContext:
    replicas = [ReplicaID(f"{deployment.name}-{index}", deployment) for index in range(len(stats))]
    raw: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {}
    for replica, values in zip(replicas, stats, strict=True):
        for name, value in (values or {}).items():
            raw.setdefault(name, {})[replica] = [TimeStampedValue(0, -1.0), TimeStampedValue(now_s - age_s, value)]
    return AutoscalingContext(
        deployment_id=deployment,
        deployment_name=deployment.name,
        app_name=deployment.app_name,
        current_num_replicas=len(replicas),
        target_num_replicas=len(replicas) if target is None else target,
        running_replicas=replicas,
        total_num_requests=lambda: queued,
        total_queued_requests=lambda: queued,
        aggregated_metrics=None,
        raw_metrics=lambda: raw,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=20,
        policy_state=state or {},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=now_s,
        config=AutoscalingConfig(**AUTOSCALING_CONFIG),
    )


def contexts(rate: float = 10, num_prefill: int = 2, num_decode: int = 2, **decode: Any) -> dict[Any, Any]:
    return {
        PREFILL: context(PREFILL, [replica_stats()] * num_prefill),
        DECODE: context(DECODE, [replica_stats(rate / max(num_decode, 1))] * num_decode, **decode),
        GATEWAY: context(GATEWAY, [None]),
    }


@pytest.fixture
def policy() -> PoolPolicy:
    return PoolPolicy(settings=SETTINGS)


def test_ray_makes_the_policy_from_a_serve_config() -> None:
    application = ServeApplicationSchema(
        name="app",
        import_path="a:b",
        autoscaling_policy=POLICY,
        deployments=[{"name": "Prefill:tiny", "autoscaling_config": AUTOSCALING_CONFIG}],
    )
    # In a process of its own: Ray pickles the class by value, and here that would replace the methods under test.
    code = (
        "import json, sys\n"
        "from ray.serve._private.autoscaling_state import _resolve_policy_callable\n"
        "from ray.serve.config import AutoscalingPolicy\n"
        "policy = _resolve_policy_callable(AutoscalingPolicy(**json.loads(sys.argv[1])))\n"
        "assert policy({}) == ({}, {})\n"
        "print(type(policy).__name__)"
    )
    command = [sys.executable, "-c", code, json.dumps(application.autoscaling_policy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-1:] == ["PoolPolicy"], done.stderr


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the controller's log gets."""
    found: list[str] = []
    logger, handler = logging.getLogger("ray.serve"), logging.Handler()
    handler.emit = lambda entry: found.append(entry.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_wrong_settings_are_refused_when_the_policy_is_made() -> None:
    with pytest.raises(ConfigError, match="targets.ttft_s"):
        PoolPolicy(settings=SETTINGS | {"targets": {"ttft_s": 0.001, "tpot_s": 0.05}})


def test_rays_wrapper_carries_a_decision_through_unchanged(policy: PoolPolicy) -> None:
    wrapped = _apply_app_level_autoscaling_config(policy)
    sizes, states = wrapped(contexts(rate=20))
    assert set(sizes) == {PREFILL, DECODE}  # the gateway is another's business
    assert sizes[PREFILL] > 2 and sizes[DECODE] > 2
    assert set(states) == {PREFILL, DECODE, GATEWAY}
    json.dumps(states[DECODE])


def test_the_memory_comes_back_from_rays_state(policy: PoolPolicy) -> None:
    wrapped = _apply_app_level_autoscaling_config(policy)
    states: dict[Any, dict[str, Any]] = {}
    for tick in range(1, 15):
        seen = contexts(rate=2, num_prefill=6, num_decode=6, now_s=1000 + 30 * tick, state=states.get(DECODE))
        sizes, states = wrapped(seen)
        if sizes[DECODE] < 6:
            break
    assert tick == 11  # 300 s after it was first seen that less would do
    assert len(states[DECODE]["memory"]["windows"]) == 11


def test_between_decisions_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = PoolPolicy(settings=SETTINGS, interval_s=5)
    first, states = policy(contexts(rate=20))
    monkeypatch.setattr(autoscaling, "decide", None)
    seen = contexts(rate=1, state=states[DECODE], now_s=1004)
    assert policy(seen)[0] == first


def test_a_request_that_waits_for_empty_pools_starts_both() -> None:
    policy = PoolPolicy(settings=SETTINGS)
    seen = {PREFILL: context(PREFILL, []), DECODE: context(DECODE, [], queued=1)}
    assert policy(seen)[0] == {PREFILL: 1, DECODE: 1}


def test_observation_has_what_replicas_reported() -> None:
    seen = contexts(rate=10)
    seen[PREFILL] = context(
        PREFILL,
        [replica_stats(queued_prompt_tokens=700, pending_kv_tokens=5), None],
        target=3,
        age_s=4,
    )
    pools = find_pools(seen)
    assert pools is not None
    observation = build_observation(seen, pools, None, staleness_s=60)
    reported, silent, starting = observation.prefill.replicas
    assert (reported.name, reported.age_s) == ("Prefill:tiny-0", 4)
    assert (reported.queued_prompt_tokens, reported.pending_kv_tokens) == (700, 5)
    assert silent.state == "running" and math.isinf(silent.age_s)
    assert starting.state == "starting"
    assert observation.arrivals is not None
    assert observation.arrivals.lengths.total.requests == pytest.approx(300, abs=4)
    assert observation.arrivals.lengths.total.completion_tokens == pytest.approx(30_000, abs=400)


def test_rays_own_metrics_alone_are_no_report() -> None:
    seen = contexts()
    seen[DECODE] = context(DECODE, [{"running_requests": 3.0}])
    observation = build_observation(seen, {"prefill": PREFILL, "decode": DECODE}, None, staleness_s=60)
    assert math.isinf(observation.decode.replicas[0].age_s)
    assert observation.arrivals is None


def test_stale_reports_count_no_arrivals() -> None:
    seen = contexts(rate=10, age_s=100)
    observation = build_observation(seen, {"prefill": PREFILL, "decode": DECODE}, None, staleness_s=60)
    assert observation.arrivals is None


@pytest.mark.parametrize("missing", [PREFILL, DECODE])
def test_without_one_of_the_pools_nothing_is_decided(missing: DeploymentID) -> None:
    policy = PoolPolicy(settings=SETTINGS)
    seen = {name: one for name, one in contexts(state={"kept": 1}).items() if name != missing}
    sizes, states = policy(seen)
    assert sizes == {}
    assert set(states) == set(seen)


def test_an_error_keeps_all_sizes(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(autoscaling, "decide", fail)
    sizes, states = PoolPolicy(settings=SETTINGS)(contexts(state={"memory": {}}))
    assert sizes == {}
    assert states[DECODE] == {"memory": {}, "decided_s": 1000}  # the next try is after the interval
    assert "keep their sizes" in lines[0]


def test_a_policy_whose_model_is_away_keeps_all_sizes_until_it_is_back(tmp_path: Path) -> None:
    """A controller that comes back makes its policies at once, whatever the registry does."""
    pair = {"model": str(tmp_path / "tiny"), "prefill": {"max_replicas": 9}, "decode": {"max_replicas": 9}}
    policy = PoolPolicy(settings={"targets": SETTINGS["targets"]}, pair=pair)
    sizes, states = policy(contexts(rate=20))
    assert sizes == {}
    write_student(tmp_path / "tiny", TinyShape(), 2, 2)
    sizes, _ = policy(contexts(rate=20, state=states[DECODE], now_s=1002))
    assert set(sizes) == {PREFILL, DECODE}


def test_targets_that_no_size_meets_are_refused_when_ray_makes_the_policy(tmp_path: Path) -> None:
    """`serve deploy` knows nothing of our checks; the policy's constructor is what it runs."""
    pair = {"model": str(tmp_path / "tiny"), "prefill": {"max_replicas": 9}, "decode": {"max_replicas": 9}}
    write_student(tmp_path / "tiny", TinyShape(), 2, 2)
    PoolPolicy(settings={"targets": SETTINGS["targets"]}, pair=pair)
    with pytest.raises(ConfigError, match="tpot_s"):
        PoolPolicy(settings={"targets": {"ttft_s": 1, "tpot_s": 1e-12}}, pair=pair)


def test_a_decision_is_one_line_of_json_when_it_changes(policy: PoolPolicy, lines: list[str]) -> None:
    _, states = policy(contexts(rate=20))
    policy(contexts(rate=20, state=states[DECODE], now_s=1010))
    assert len(lines) == 1
    line = json.loads(lines[0])
    assert line["application"] == "app"
    assert line["prefill_replicas"] > 2
    assert {reason["code"] for reason in line["reasons"]} <= set(CODES)
    assert line["inputs"]["requests_per_s"] == pytest.approx(20, rel=0.05)
    assert line["inputs"]["pools"]["decode"]["running"] == 2


def test_every_gauge_of_the_table_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: dict[str, set[str]] = {}

    def note(name: str, value: float, **labels: str) -> None:
        assert set(labels) == set(METRICS[name].labels)
        recorded.setdefault(name, set()).update(labels.values())

    monkeypatch.setattr(autoscaling, "record", note)
    PoolPolicy(settings=SETTINGS)(contexts(rate=20))
    assert set(recorded) == {name for name in METRICS if name.startswith("swiftkv_policy_")}
    assert recorded["swiftkv_policy_reason"] == {"app", "prefill", "decode", *CODES}


# Prometheus.


def vector(*samples: tuple[dict[str, str], float]) -> PrometheusVector:
    return PrometheusVector(tuple(PrometheusSample(labels, value, 1000.0) for labels, value in samples))


def test_arrivals_come_from_prometheus_where_it_has_them() -> None:
    own, other = {"ReplicaId": "Decode:tiny-0"}, {"ReplicaId": "another application's"}
    ours, theirs = {"application": "app"}, {"application": "another"}
    results = {
        PROMPTS_QUERY: vector(
            (ours | {"le": "500"}, 0),
            (ours | {"le": "1000"}, 60),
            (ours | {"le": "5000"}, 90),
            (ours | {"le": "+Inf"}, 90),
            (theirs | {"le": "1000"}, 7000),
        ),
        PROMPT_TOKENS_QUERY: vector((ours, 120_000), (theirs, 1e9)),
        FINISHED_QUERY: vector((own, 90), (other, 1e9)),
        COMPLETION_TOKENS_QUERY: vector((own, 9000), (other, 1e9)),
    }
    observation = build_observation(contexts(), {"prefill": PREFILL, "decode": DECODE}, results, staleness_s=60)
    assert observation.notes == ("arrivals: prometheus",)
    assert observation.arrivals is not None and observation.arrivals.window_s == 60
    total = observation.arrivals.lengths.total
    assert total.requests == 90
    assert total.prompt_tokens == total.uncached_tokens == pytest.approx(120_000)
    assert total.completion_tokens == pytest.approx(9000)


def test_without_an_answer_from_prometheus_the_replicas_are_asked() -> None:
    for results in (None, {}, {PROMPTS_QUERY: vector()}):
        observation = build_observation(contexts(), {"prefill": PREFILL, "decode": DECODE}, results, staleness_s=60)
        assert observation.notes == ("arrivals: replicas",)
        assert observation.arrivals is not None


def test_a_converted_histogram_keeps_sums_and_knows_what_is_cached() -> None:
    lengths = convert_histogram({100.0: 10, 1000.0: 30, math.inf: 31}, 15_000, 31, 3100, uncached_frac=0.25)
    total = lengths.total
    assert total.requests == 31
    assert total.prompt_tokens == pytest.approx(15_000)
    assert total.uncached_tokens == pytest.approx(3750)
    assert len(lengths.buckets) == 3
    assert convert_histogram({100.0: 0, math.inf: 0}, 0, 0, 0, 1).total.requests == 0
