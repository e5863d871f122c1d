"""The ways to record into the table's metrics.

Ray exports what is recorded from each worker, with `ray_` in front of the name; outside a Ray process recording does
nothing, and loads nothing.
Called by: the files that the table names. Calls: metrics/table.py, Ray's metrics.
"""

import os
import sys
from functools import cache
from typing import Any

from swiftkv.metrics.table import METRICS, Metric

METERING_KEY = "SWIFTKV_METERING"
"""Environment variable of a whole cluster; `off` is for measuring what metering costs."""


def is_metering() -> bool:
    """Whether this process records anything."""
    return os.environ.get(METERING_KEY) != "off"


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
    ray = sys.modules.get("ray")  # a process of Ray's has loaded it
    if ray is None or not ray.is_initialized() or not is_metering():
        return None
    return _build_instrument(metric)


@cache
def _build_instrument(metric: Metric) -> Any:
    from ray.util import metrics as ray_metrics

    common = {"description": metric.help, "tag_keys": metric.labels}
    if metric.kind == "histogram":
        return ray_metrics.Histogram(metric.name, boundaries=list(metric.boundaries), **common)
    return {"gauge": ray_metrics.Gauge, "counter": ray_metrics.Counter}[metric.kind](metric.name, **common)
