"""Every metric that the platform exports: one table, and the ways to record into it.

Does not scrape, store or draw. Ray exports what is recorded here from each worker, with `ray_` in front of the
name; outside a Ray process recording does nothing.
Called by: distill/records.py, serving/autoscaling.py, serving/gateway/exchange.py.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """One row of the table. The unit is part of the name, as Prometheus asks."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    labels: tuple[str, ...]
    recorded_by: str
    boundaries: tuple[float, ...] = ()
    """Upper ends of a histogram's buckets."""


_LENGTHS_TOKENS = tuple(float(1 << power) for power in range(4, 18))
_LATENCIES_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


METRICS = {
    metric.name: metric
    for metric in (
        Metric("swiftkv_distill_step", "gauge", "Optimizer steps done.", ("run",), "distill/records.py"),
        Metric("swiftkv_distill_loss_nats", "gauge", "Distillation loss.", ("run", "part"), "distill/records.py"),
        Metric(
            "swiftkv_distill_tokens_per_second", "gauge", "Tokens/s of all workers.", ("run",), "distill/records.py"
        ),
        Metric("swiftkv_distill_learning_rate", "gauge", "Learning rate.", ("run",), "distill/records.py"),
        Metric("swiftkv_distill_gradient_norm", "gauge", "Before clipping.", ("run",), "distill/records.py"),
        Metric("swiftkv_distill_memory_bytes", "gauge", "In use by one worker.", ("run",), "distill/records.py"),
        Metric("swiftkv_distill_remaining_seconds", "gauge", "Until the last step.", ("run",), "distill/records.py"),
        Metric(
            "swiftkv_policy_wanted_replicas",
            "gauge",
            "Replicas that the policy asks for.",
            ("application", "pool"),
            "serving/autoscaling.py",
        ),
        Metric(
            "swiftkv_policy_demand_tokens_per_second",
            "gauge",
            "Prompt tokens (prefill) or completion tokens (decode) that arrive to be computed.",
            ("application", "pool"),
            "serving/autoscaling.py",
        ),
        Metric(
            "swiftkv_policy_reason",
            "gauge",
            "1 while it is a reason of the policy's decision.",
            ("application", "pool", "reason"),
            "serving/autoscaling.py",
        ),
        Metric(
            "swiftkv_policy_predicted_ttft_seconds",
            "gauge",
            "TTFT at the target's percentile with the wanted replicas.",
            ("application",),
            "serving/autoscaling.py",
        ),
        Metric(
            "swiftkv_policy_predicted_tpot_seconds",
            "gauge",
            "TPOT at the target's percentile with the wanted replicas.",
            ("application",),
            "serving/autoscaling.py",
        ),
        Metric(
            "swiftkv_policy_input",
            "gauge",
            "A figure that the policy's last decision rested on, by its name in the decision's log line.",
            ("application", "pool", "input"),
            "serving/autoscaling.py",
        ),
        Metric(
            "swiftkv_policy_decision_seconds",
            "gauge",
            "What the last decision took.",
            ("application",),
            "serving/autoscaling.py",
        ),
        Metric(
            "swiftkv_hop_break_even_tokens",
            "gauge",
            "Uncached prompt tokens from which on the prefill pool is asked; 1e9 where it never pays.",
            (),
            "serving/decode.py",
        ),
        Metric(
            "swiftkv_hop_prompts_total",
            "counter",
            "Prompts by where they were prefilled.",
            ("way",),
            "serving/decode.py",
        ),
        Metric(
            "swiftkv_arrived_prompt_tokens",
            "histogram",
            "Prompt tokens of requests when they reach a decode replica, estimated where they are text.",
            ("application",),
            "serving/decode.py",
            _LENGTHS_TOKENS,
        ),
        Metric(
            "swiftkv_prefill_seconds_total",
            "counter",
            "What a prefill engine did: computing, waiting (prompts had no KV blocks, those of others being yet to be "
            "fetched), exporting (nothing to compute, and KV yet to be fetched). Without work it counts nothing.",
            ("doing",),
            "serving/prefill.py",
        ),
        Metric("swiftkv_hop_failures_total", "counter", "Prompts the prefill pool failed at.", (), "serving/decode.py"),
        Metric(
            "swiftkv_gateway_requests_total",
            "counter",
            "HTTP requests by the status they ended with; 499 is a client that left.",
            ("tenant", "model", "status"),
            "serving/gateway/exchange.py",
        ),
        Metric(
            "swiftkv_gateway_tokens_total",
            "counter",
            "Tokens of requests; cached ones are among the prompt's.",
            ("tenant", "model", "kind"),
            "serving/gateway/exchange.py",
        ),
        Metric(
            "swiftkv_gateway_ttft_seconds",
            "histogram",
            "From a streamed request's arrival to its first chunk.",
            ("model",),
            "serving/gateway/exchange.py",
            _LATENCIES_S,
        ),
        Metric(
            "swiftkv_rollout_share_frac",
            "gauge",
            "The new version's part of the requests; 0 while there is none.",
            ("model",),
            "serving/rollout/rollout.py",
        ),
        Metric(
            "swiftkv_rollout_check_ratio",
            "gauge",
            "What a new version is judged by: failures more than the stable one has, its times over those, agreement.",
            ("model", "check"),
            "serving/rollout/rollout.py",
        ),
        Metric(
            "swiftkv_rollout_decisions_total",
            "counter",
            "New versions switched to or rejected, and why.",
            ("model", "outcome", "reason"),
            "serving/rollout/rollout.py",
        ),
        Metric(
            "swiftkv_gateway_queue_seconds",
            "histogram",
            "From a request's ticket to its turn.",
            ("tenant",),
            "serving/gateway/exchange.py",
            _LATENCIES_S,
        ),
    )
}


def record(name: str, value: float, **labels: str) -> None:
    """Set a gauge.

    Raises: KeyError for a name, AssertionError for labels or a kind that the table does not have: all are our bugs.
    """
    instrument = _find_instrument(name, "gauge", labels)
    if instrument is not None:
        instrument.set(value, tags=labels)


def count(name: str, amount: float, **labels: str) -> None:
    """Add to a counter. Raises: as `record`."""
    instrument = _find_instrument(name, "counter", labels)
    if instrument is not None:
        instrument.inc(amount, tags=labels)


def observe(name: str, value: float, **labels: str) -> None:
    """Put a value into a histogram. Raises: as `record`."""
    instrument = _find_instrument(name, "histogram", labels)
    if instrument is not None:
        instrument.observe(value, tags=labels)


def _find_instrument(name: str, kind: str, labels: dict[str, str]) -> Any:
    metric = METRICS[name]
    assert metric.kind == kind, f"{name} is a {metric.kind}, not a {kind}"
    assert set(labels) == set(metric.labels), f"{name} has labels {metric.labels}, got {tuple(labels)}"
    return _build_instrument(metric)


@cache
def _build_instrument(metric: Metric) -> Any:
    import ray
    from ray.util import metrics as ray_metrics

    if not ray.is_initialized():
        return None
    common = {"description": metric.help, "tag_keys": metric.labels}
    if metric.kind == "histogram":
        return ray_metrics.Histogram(metric.name, boundaries=list(metric.boundaries), **common)
    return {"gauge": ray_metrics.Gauge, "counter": ray_metrics.Counter}[metric.kind](metric.name, **common)
