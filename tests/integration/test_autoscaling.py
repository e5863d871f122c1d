"""The policy on Ray Serve's real controller, with stand-ins for engines: two applications at the same time.

One grows under load and shrinks when it falls; the other ends while nothing arrives and begins again with the first
request. Both keep to their budget of devices, and no request is lost.
"""

import urllib.request

import psutil
import pytest

from swiftkv.bench.serve.shapes import build_application, read_decisions, send_load
from swiftkv.bench.shape_load import LoadPlan, name_application
from swiftkv.cluster import choose_ports, start_cluster, stop_cluster
from swiftkv.serving.deploy import deploy_config
from swiftkv.serving.policy.settings import POOLS, PolicySettings

pytestmark = pytest.mark.cluster

BUDGET = 5
FALLING, SILENT = "step down", "nothing, then traffic"
PLAN = LoadPlan(shapes=[FALLING, SILENT], rate_frac=0.4, tokens_frac=0.1, settled_s=25, until_s=85, seed=1)
SETTINGS = {
    "targets": {"ttft_s": 4, "tpot_s": 0.1},
    # 9.6 prompts of 150 tokens a second keep 3 replicas busy, and their answers of 12 tokens 2 or 3.
    "costs": {"prefill_s_per_token": 2e-3, "step_s": 0.04, "step_s_per_sequence": 0.01, "kv_tokens": 50_000},
    "device_budget": BUDGET,
    "drain": "waits",
    "scale_down_delay_s": 5,
    "scale_to_zero_delay_s": 5,
}


def build_settings(min_replicas):
    limits = {"min_replicas": min_replicas, "max_replicas": 4, "startup_s": 5}
    return PolicySettings.model_validate(SETTINGS | {"prefill": limits, "decode": limits})


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWIFTKV_HOME", str(tmp_path_factory.mktemp("home")))
        started = start_cluster()
        yield started
        stop_cluster(started)


@pytest.fixture(scope="module")
def run(cluster):
    """Every request's outcome and both pools' sizes, by application."""
    (port,) = choose_ports(1)
    applications = [
        build_application(FALLING, build_settings(min_replicas=1), initial_replicas=1),
        build_application(SILENT, build_settings(min_replicas=0), initial_replicas=1),
    ]
    deploy_config(cluster, {"http_options": {"host": "127.0.0.1", "port": port}, "applications": applications})
    _, outcomes, sizes = send_load(cluster, PLAN, lambda _: None)
    return outcomes, {name: {pool: [size for _, size in sizes[name][pool]] for pool in POOLS} for name in PLAN.shapes}


@pytest.mark.parametrize("name", PLAN.shapes)
def test_no_request_is_lost(run, name):
    outcomes, _ = run
    assert len(outcomes[name]) > 100
    assert [outcome.error for outcome in outcomes[name] if outcome.error] == []


def test_pools_grow_under_load_and_shrink_when_it_falls(run):
    sizes = run[1][FALLING]
    for pool in POOLS:
        assert sizes[pool][0] == 1, sizes
        assert max(sizes[pool]) >= 2, sizes
    both = [sum(pair) for pair in zip(sizes["prefill"], sizes["decode"], strict=True)]
    assert both[-1] < max(both), sizes  # the smaller load may still need one of them as large


def test_pools_end_while_nothing_arrives_and_begin_again(run):
    sizes = run[1][SILENT]
    for pool in POOLS:
        ended = sizes[pool].index(0)
        assert max(sizes[pool][ended:]) >= 1, sizes


@pytest.mark.parametrize("name", PLAN.shapes)
def test_the_budget_of_devices_is_kept(run, name):
    sizes = run[1][name]
    assert max(map(sum, zip(sizes["prefill"], sizes["decode"], strict=True))) <= BUDGET, sizes


def test_decisions_are_lines_in_the_controllers_log(cluster, run):
    lines = [line for line in read_decisions(cluster) if line["application"] == name_application(FALLING)]
    assert max(line["prefill_replicas"] for line in lines) == max(run[1][FALLING]["prefill"])
    codes = {reason["code"] for line in lines for reason in line["reasons"]}
    assert {"demand", "budget"} <= codes
    assert any(line["inputs"]["requests_per_s"] > 5 for line in lines)


def test_decisions_are_gauges(cluster, run):
    words = psutil.Process(cluster.pid).cmdline()
    port = words[words.index("--metrics-export-port") + 1]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        exported = response.read().decode()
    for name in ("wanted_replicas", "demand_tokens_per_second", "reason", "predicted_ttft_seconds", "decision_seconds"):
        assert f"ray_swiftkv_policy_{name}{{" in exported
