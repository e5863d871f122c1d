"""`swiftkv top`: what the running cluster serves at this moment, in the terminal; needs no Prometheus.

Called by: cli/main.py. Calls: metrics/reading.py, cluster.
"""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from swiftkv.cluster import find_cluster
from swiftkv.errors import ClusterError
from swiftkv.metrics.reading import Look, find_endpoints, find_quantile, look, rate_by

INTERVAL_S = 10.0
"""Ray's agents export every 10 s: looks closer together show the same."""

POOLS = {"Prefill": "prefill", "Decode": "decode", "LLMServer": "single"}
"""By what the names of their deployments begin with."""


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one view, of the next ten seconds, and end.")] = False,
    discovery: Annotated[
        Path | None,
        typer.Option(help="Ray's file of metrics endpoints, of another cluster (prom_metrics_service_discovery.json)."),
    ] = None,
) -> None:
    """Show tokens/s, times, pools, KV and tenants of the running cluster."""
    path = discovery or _find_discovery()
    before = _look(path)
    if once:
        time.sleep(INTERVAL_S)
        Console().print(render(before, _look(path)))
        return
    with Live(f"the first view comes in {INTERVAL_S:.0f} s; Ctrl-C ends", auto_refresh=False) as live:
        while True:
            time.sleep(INTERVAL_S)
            after = _look(path)
            live.update(render(before, after), refresh=True)
            before = after


def _find_discovery() -> Path:
    cluster = find_cluster()
    if cluster is None:
        raise ClusterError("no cluster of this folder runs. Start one (swiftkv serve), or name another's --discovery.")
    return cluster.metrics_path


def _look(discovery: Path) -> Look:
    endpoints = find_endpoints(discovery)
    found = look(endpoints)
    if not found.samples:
        raise ClusterError(
            f"nothing answers at the endpoints in {discovery} ({', '.join(endpoints) or 'it names none'}): the cluster "
            "is gone, or has been up for a few seconds only."
        )
    return found


def render(before: Look, after: Look) -> Group:
    """The view of what happened between two looks. Models and tenants are a gateway's: without one there are none."""
    tables = [_render_models(before, after), _render_pools(before, after), _render_tenants(before, after)]
    shown = [table for table in tables if table.row_count]
    return Group(*shown) if shown else Group("nothing is served")


def _render_models(before: Look, after: Look) -> Table:
    table = _build_table("models", "model", "requests/s", "good/s", "TTFT p50", "p95", "TPOT p50", "p95")
    requests = rate_by(before, after, "ray_swiftkv_gateway_requests_total", "model")
    good = rate_by(before, after, "ray_swiftkv_gateway_good_requests_total", "model", target="both")
    for (model,), rate in sorted(requests.items()):
        times = [
            find_quantile(before, after, f"ray_swiftkv_gateway_{name}_seconds", fraction, model=model)
            for name in ("ttft", "tpot")
            for fraction in (0.5, 0.95)
        ]
        table.add_row(model, f"{rate:.2f}", f"{good.get((model,), 0):.2f}", *map(_describe_time, times))
    return table


def _render_pools(before: Look, after: Look) -> Table:
    table = _build_table(
        "pools", "application", "pool", "replicas", "wanted", "prompt tokens/s", "completion tokens/s", "KV", "running"
    )
    healthy = after.sum_by("ray_serve_deployment_replica_healthy", "application", "deployment")
    wanted = after.sum_by("ray_serve_autoscaling_target_replicas", "application", "deployment")
    workers = after.sum_by("ray_serve_deployment_replica_starts_total", "WorkerId", "application", "deployment")
    prompt = rate_by(before, after, "ray_vllm_prompt_tokens_total", "WorkerId")
    completion = rate_by(before, after, "ray_vllm_generation_tokens_total", "WorkerId")
    usage = after.sum_by("ray_vllm_kv_cache_usage_perc", "WorkerId")
    running = after.sum_by("ray_vllm_num_requests_running", "WorkerId")
    for (application, deployment), replicas in sorted(healthy.items()):
        pool = POOLS.get(deployment.partition(":")[0])
        if pool is None:
            continue
        mine = [(worker,) for worker, *of in workers if of == [application, deployment]]
        used = [usage[worker] for worker in mine if worker in usage]
        table.add_row(
            application,
            pool,
            f"{replicas:.0f}",
            f"{wanted.get((application, deployment), replicas):.0f}",
            f"{sum(prompt.get(worker, 0) for worker in mine):,.0f}",
            f"{sum(completion.get(worker, 0) for worker in mine):,.0f}" if pool != "prefill" else "",
            f"{max(used):.0%}" if used else "-",
            f"{sum(running.get(worker, 0) for worker in mine):.0f}",
        )
    return table


def _render_tenants(before: Look, after: Look) -> Table:
    table = _build_table("tenants", "tenant", "prompt tokens/s", "cached", "completion tokens/s", "refused/s")
    name = "ray_swiftkv_gateway_tokens_total"
    tokens = {kind: rate_by(before, after, name, "tenant", kind=kind) for kind in ("prompt", "cached", "completion")}
    refused = rate_by(before, after, "ray_swiftkv_gateway_refusals_total", "tenant")
    for tenant in sorted({*tokens["prompt"], *refused}):
        rates = [f"{tokens[kind].get(tenant, 0):,.0f}" for kind in ("prompt", "cached", "completion")]
        table.add_row(tenant[0], *rates, f"{refused.get(tenant, 0):.2f}")
    return table


def _build_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        is_name = column in ("model", "application", "pool", "tenant")
        table.add_column(column, justify="left" if is_name else "right", no_wrap=is_name)
    return table


def _describe_time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
