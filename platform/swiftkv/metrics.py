"""Every metric that the platform exports: one table, and the one way to record into it.

Does not scrape, store or draw. Ray exports what is recorded here from each worker, with `ray_` in front of the
name; outside a Ray process recording does nothing.
Called by: distill/records.py.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """One row of the table. The unit is part of the name, as Prometheus asks."""

    name: str
    kind: Literal["gauge"]
    help: str
    labels: tuple[str, ...]
    recorded_by: str


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
    )
}


def record(name: str, value: float, **labels: str) -> None:
    """Set a gauge.

    Raises: KeyError for a name, AssertionError for labels that the table does not have: both are our bugs.
    """
    metric = METRICS[name]
    assert set(labels) == set(metric.labels), f"{name} has labels {metric.labels}, got {tuple(labels)}"
    instrument = _build_instrument(metric)
    if instrument is not None:
        instrument.set(value, tags=labels)


@cache
def _build_instrument(metric: Metric) -> Any:
    import ray
    from ray.util import metrics as ray_metrics

    if not ray.is_initialized():
        return None
    return ray_metrics.Gauge(metric.name, description=metric.help, tag_keys=metric.labels)
