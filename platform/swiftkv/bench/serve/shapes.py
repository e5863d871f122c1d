"""Ten load shapes on Ray Serve's real controller with the policy, five at the same time, applications of stand-ins.

Ray, the controller, the policy, the replicas' reports and the clock are real; engines are stand-ins whose service times
follow from the model's spec and a core's measured rates. The best size comes from trying sizes in virtual time.

Called by: bench/serve/run.py. Calls: bench/stand_ins.py, bench/shape_load.py, capacity/sizing.py, cluster.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from swiftkv.bench.models import LAPTOP_SHAPE
from swiftkv.bench.pairs import OnStage
from swiftkv.bench.ratios import summarise_values
from swiftkv.bench.serve.rows import ROW_BY_NAME
from swiftkv.bench.serve.servers import run_platform
from swiftkv.bench.shape_load import LoadPlan, RequestOutcome, name_application
from swiftkv.bench.table import Result
from swiftkv.capacity.load_shapes import build_shapes
from swiftkv.capacity.sizing import count_reversals, find_best
from swiftkv.cluster import Cluster, choose_ports
from swiftkv.errors import ClusterError
from swiftkv.serving.deploy import deploy_config
from swiftkv.serving.hardware import CPU
from swiftkv.serving.pair_policy import RATES
from swiftkv.serving.policy.costs import Costs, Hardware, build_costs
from swiftkv.serving.policy.settings import POOLS, PolicySettings, Pool, PoolLimits, Targets
from swiftkv.spec import SwiftKVSpec

MAX_REPLICAS = 12
AT_ONCE = 5
"""Shapes. A stand-in's process takes 0.14 GB: those of ten shapes had more than 24 GB."""
STARTUP_S = 15.0
JUDGED_S = 600.0
"""The last ten minutes."""
_POLL_S = 5.0
_LONGEST_REQUEST_S = 120.0

MAX_SENT_LATE_S = 0.25
"""At the 99th percentile. Of the TTFT target it is a thirtieth."""
MAX_LATE_FRAC = 0.05
"""How much too long the stand-ins' work may be on average."""

Sizes = dict[str, dict[Pool, list[tuple[float, int]]]]
"""By shape and pool: when, by the monotonic clock, and how many replicas the controller wanted."""


def build_plan(names: list[str]) -> LoadPlan:
    """Two minutes in which the shapes change, then twelve at the last level."""
    return LoadPlan(shapes=names, rate_frac=0.25, tokens_frac=0.25, settled_s=120, until_s=840, seed=1)


def build_settings() -> PolicySettings:
    """The policy's, with the costs of the benches' laptop model on one core of the README's machine, in float32."""
    core = Hardware(**RATES[CPU]._asdict(), kv_bytes=2 * 2**30)
    spec = SwiftKVSpec(LAPTOP_SHAPE, LAPTOP_SHAPE.num_hidden_layers // 2)
    costs = build_costs(spec, core, core, bytes_per_parameter=4, bytes_per_kv_value=4, max_num_seqs=64)
    limits = PoolLimits(min_replicas=1, max_replicas=MAX_REPLICAS, startup_s=STARTUP_S)
    # A prefill replica's stand-in ends after its lease, as ours do.
    return PolicySettings(
        targets=Targets(ttft_s=8, tpot_s=0.2), costs=costs, prefill=limits, decode=limits, drain="waits"
    )


def measure_shapes(say: OnStage) -> tuple[list[Result], dict[str, Any]]:
    """Rows and figures, five shapes at once on a cluster of their own. Takes about half an hour.

    Raises: ClusterError if a cluster does not start, or the machine did not keep up, so that figures mean nothing.
    """
    settings, names = build_settings(), list(build_shapes())
    groups = [measure_group(names[start : start + AT_ONCE], settings, say) for start in range(0, len(names), AT_ONCE)]
    shapes = {name: found for group in groups for name, found in group["shapes"].items()}
    figures = {
        "service_times": "from the spec of the benches' laptop model and rates measured on this machine; no engine ran",
        "settings": settings.model_dump(mode="json"),
        "groups": groups,
    }
    return build_results(shapes), figures


def measure_group(names: list[str], settings: PolicySettings, say: OnStage) -> dict[str, Any]:
    """What became of these shapes at the same time."""
    plan = build_plan(names)
    with run_platform(say) as platform:
        say(f"deploying {len(names)} applications of stand-ins")
        deploy_stand_ins(platform.cluster, plan, settings)
        began_s, outcomes, sizes = send_load(platform.cluster, plan, say)
        decisions = read_decisions(platform.cluster)
    lateness = measure_lateness(plan, settings.costs, outcomes)
    check_lateness(lateness)
    say("finding the best sizes")
    shapes = {
        name: judge_shape(plan, settings, name, sizes[name], outcomes[name], began_s + plan.until_s) for name in names
    }
    changes = list_changes(decisions)
    return {"plan": plan.model_dump(mode="json"), "lateness": lateness, "shapes": shapes, "changes": changes}


def deploy_stand_ins(cluster: Cluster, plan: LoadPlan, settings: PolicySettings) -> None:
    """One application per shape, each with a policy of its own."""
    applications = [build_application(name, settings, shape.start) for name, shape in plan.build().items()]
    (port,) = choose_ports(1)
    deploy_config(cluster, {"http_options": {"host": "127.0.0.1", "port": port}, "applications": applications})


def build_application(shape: str, settings: PolicySettings, initial_replicas: int) -> dict[str, Any]:
    """A shape's application, as in a Serve config."""
    pools = {pool: settings.limits(pool).model_dump() for pool in POOLS}
    return {
        "name": name_application(shape),
        "route_prefix": None,
        "import_path": "swiftkv.bench.stand_ins:build_stand_ins",
        "args": pools | {"costs": settings.costs.model_dump(), "initial_replicas": initial_replicas},
        "autoscaling_policy": {
            "policy_function": "swiftkv.serving.autoscaling:PoolPolicy",
            "policy_kwargs": {"settings": settings.model_dump(mode="json")},
        },
    }


def send_load(cluster: Cluster, plan: LoadPlan, say: OnStage) -> tuple[float, dict[str, list[RequestOutcome]], Sizes]:
    """When it began, every request's outcome, and the sizes meanwhile. Raises: ClusterError if the sender failed."""
    sender = subprocess.Popen(
        [sys.executable, "-m", "swiftkv.bench.shape_load"],
        env=cluster.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert sender.stdin is not None and sender.stdout is not None
        sender.stdin.write(plan.model_dump_json() + "\n")
        sender.stdin.close()
        began_s = float(sender.stdout.readline() or "nan")
        sizes = watch_sizes(cluster, plan, began_s, say)
        found = json.loads(sender.stdout.read() or "null")
    finally:
        sender.kill()
    if found is None:
        raise ClusterError("the process that sends the load failed; its error is above.")
    outcomes = {name: [RequestOutcome.model_validate(entry) for entry in entries] for name, entries in found.items()}
    return began_s, outcomes, sizes


def watch_sizes(cluster: Cluster, plan: LoadPlan, began_s: float, say: OnStage) -> Sizes:
    """Both pools' target sizes until the load is over."""
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    client = ServeSubmissionClient(cluster.dashboard_url, headers=cluster.headers())
    sizes: Sizes = {name: {pool: [] for pool in POOLS} for name in plan.shapes}
    said_s = 0.0
    while (passed_s := time.monotonic() - began_s) < plan.until_s:
        applications = client.get_serve_details()["applications"]
        for name in plan.shapes:
            for deployment, details in applications[name_application(name)]["deployments"].items():
                pool: Pool = "prefill" if deployment.startswith("Prefill:") else "decode"
                sizes[name][pool].append((time.monotonic(), details["target_num_replicas"]))
        if passed_s - said_s >= 60:
            said_s = passed_s
            say(f"{passed_s:.0f} of {plan.until_s:.0f} s: " + "; ".join(f"{n} {_last(s)}" for n, s in sizes.items()))
        time.sleep(_POLL_S)
    return sizes


def _last(sizes: dict[Pool, list[tuple[float, int]]]) -> str:
    return "+".join(str(sizes[pool][-1][1]) for pool in POOLS)


def read_decisions(cluster: Cluster) -> list[dict[str, Any]]:
    """The policies' log lines, in the order written."""
    found = []
    for path in sorted(cluster.folder.glob("r/session_*/logs/serve/controller_*.log")):
        for line in path.read_text("utf-8", errors="replace").splitlines():
            _, is_ours, rest = line.partition('{"event": "swiftkv_policy"')
            if is_ours:
                found.append(json.loads(is_ours + rest))
    return found


def list_changes(decisions: Sequence[dict[str, Any]]) -> list[str]:
    """Of each application's decisions those that asked for other sizes than the one before, and why, a line each."""
    wanted: dict[str, str] = {}
    lines = []
    for decision in decisions:
        name = decision["application"]
        sizes = "+".join(str(decision[f"{pool}_replicas"]) for pool in POOLS)
        if sizes != wanted.get(name):
            reasons = (f"{reason['pool'] or 'both'} {reason['code']}" for reason in decision["reasons"])
            lines.append(f"{name}: {wanted.get(name, 'at first')} to {sizes}: {', '.join(reasons) or 'as before'}")
        wanted[name] = sizes
    return lines


def judge_shape(
    plan: LoadPlan,
    settings: PolicySettings,
    name: str,
    sizes: dict[Pool, list[tuple[float, int]]],
    outcomes: Sequence[RequestOutcome],
    end_s: float,
) -> dict[str, Any]:
    """Each pool's final size, the best one, its sizes in the last ten minutes; and how requests fared then."""
    best = find_best(plan.build()[name], settings.costs, settings.targets, MAX_REPLICAS)
    judged = [outcome for outcome in outcomes if outcome.arrived_s > plan.until_s - JUDGED_S]
    targets = settings.targets
    found: dict[str, Any] = {
        "requests": len(outcomes),
        "lost": sum(outcome.ttft_s is None for outcome in outcomes),
        "errors": sorted({outcome.error for outcome in outcomes if outcome.error})[:5],
        "ttft_kept_frac": round(fmean((o.ttft_s or 1e9) <= targets.ttft_s for o in judged), 4),
        "tpot_kept_frac": round(fmean((o.tpot_s or 1e9) <= targets.tpot_s for o in judged), 4),
    }
    for pool in POOLS:
        late = [size for when_s, size in sizes[pool] if when_s > end_s - JUDGED_S]
        changes = [size for index, size in enumerate(late) if not index or size != late[index - 1]]
        found[pool] = {
            "final": late[-1],
            "best": best[pool],
            "largest": max(size for _, size in sizes[pool]),
            "last_10_minutes": changes,
            "turns": count_reversals(late),
        }
    return found


def measure_lateness(plan: LoadPlan, costs: Costs, outcomes: dict[str, list[RequestOutcome]]) -> dict[str, float]:
    """How much later than they should the sender sent and the stand-ins were done, in the last ten minutes."""
    judged = [o for found in outcomes.values() for o in found if o.arrived_s > plan.until_s - JUDGED_S]
    sent = sorted(outcome.sent_late_s for outcome in judged)
    return {
        "sent_p99_s": round(sent[int(0.99 * len(sent))], 4),
        "prefill_mean_s": round(fmean(outcome.prefill_late_s for outcome in judged), 4),
        "step_mean_s": round(fmean(outcome.step_late_s for outcome in judged), 4),
        "prefill_frac": round(fmean(o.prefill_late_s for o in judged) / costs.prefill_s(375), 4),
        "step_frac": round(fmean(o.step_late_s for o in judged) / costs.step_s, 4),
    }


def check_lateness(lateness: dict[str, float]) -> None:
    """Raises: ClusterError if stand-ins or sender did not keep up."""
    limits = {"sent_p99_s": MAX_SENT_LATE_S, "prefill_frac": MAX_LATE_FRAC, "step_frac": MAX_LATE_FRAC}
    if slow := [
        f"{name} is {lateness[name]} (at most {limit})" for name, limit in limits.items() if lateness[name] > limit
    ]:
        raise ClusterError(f"the machine did not keep up, so the sizes mean nothing: {', '.join(slow)}. Run it alone.")


def build_results(shapes: dict[str, dict[str, Any]]) -> list[Result]:
    """The three rows."""
    pools = [found[pool] for found in shapes.values() for pool in POOLS]
    worst = max(abs(pool["final"] - pool["best"]) for pool in pools)
    turns, lost = sum(pool["turns"] for pool in pools), sum(found["lost"] for found in shapes.values())
    requests = sum(found["requests"] for found in shapes.values())
    exact = sum(pool["final"] == pool["best"] for pool in pools)

    return [
        Result(ROW_BY_NAME[name], summarise_values([value]), over, measured)
        for name, value, over, measured in (
            ("shapes", worst, "best size in virtual time", f"{exact} of {len(pools)} pools exactly the best"),
            ("shapes-turns", turns, f"{len(pools)} pools, 10 minutes", f"{turns} turns"),
            ("shapes-lost", lost, f"{requests} requests", f"{lost} lost"),
        )
    ]
