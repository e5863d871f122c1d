"""The table of metrics: names, labels, and that each row is recorded where it says."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from swiftkv.metrics import METRICS, count, record, recording
from swiftkv.metrics.table import LABELS

PACKAGE = Path(__file__).parents[3] / "platform" / "swiftkv"


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_each_metric_is_recorded_where_the_table_says(metric) -> None:
    assert metric.name.startswith("swiftkv_")
    assert f'"{metric.name}"' in (PACKAGE / metric.recorded_by).read_text()


UNITS = (
    "_total",
    "_seconds",
    "_requests",
    "_sequences",
    "_tokens",
    "_bytes",
    "_replicas",
    "_frac",
    "_ratio",
    "_nats",
    "_per_second",
)
UNITLESS = {"swiftkv_distill_step", "swiftkv_distill_learning_rate", "swiftkv_distill_gradient_norm"} | {
    "swiftkv_distill_restarts",
    "swiftkv_policy_reason",
    "swiftkv_policy_input",
}


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_names_end_in_their_unit_and_labels_are_bounded(metric) -> None:
    assert metric.name.endswith(UNITS) or metric.name in UNITLESS
    assert (metric.kind == "counter") == metric.name.endswith("_total")
    assert (metric.kind == "histogram") == bool(metric.boundaries)
    assert set(metric.labels) <= set(LABELS)


def test_a_thousand_tenants_have_fewer_series_than_is_said_in_a_gateway() -> None:
    """Each uses one version of one model, in one currency, with three statuses and two refusals."""
    used = {"tenant": 1000, "model": 1, "version": 1, "status": 3, "reason": 2, "currency": 1}
    gateway = [metric for metric in METRICS.values() if "tenant" in metric.labels and "gateway" in metric.recorded_by]
    assert len(gateway) == 9
    assert sum(metric.count_series(**used) for metric in gateway) < 70_000


def test_a_thousand_tenants_have_fewer_series_than_is_said_in_a_replica() -> None:
    """Their seconds in three phases, and the unmodified model's; a hundred replicas then have fewer than 600,000."""
    replica = [metric for metric in METRICS.values() if metric.recorded_by == "serving/costs.py"]
    assert len(replica) == 3
    assert sum(metric.count_series(tenant=1000) for metric in replica) < 6000


def test_wrong_labels_and_unknown_names_are_our_bugs() -> None:
    with pytest.raises(KeyError):
        record("swiftkv_nothing", 1)
    with pytest.raises(AssertionError, match="has labels"):
        record("swiftkv_distill_step", 1, model="x")


def test_recording_begins_when_ray_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process recorded before that is lost, and not what comes after it."""
    amounts: list[float] = []
    ray = SimpleNamespace(is_initialized=lambda: False)
    counter = SimpleNamespace(inc=lambda amount, tags: amounts.append(amount))
    monkeypatch.setattr(recording, "_build_instrument", lambda metric: counter)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    count("swiftkv_registry_bytes_total", 1, operation="publish")
    monkeypatch.setitem(sys.modules, "ray", ray)
    count("swiftkv_registry_bytes_total", 2, operation="publish")
    ray.is_initialized = lambda: True
    count("swiftkv_registry_bytes_total", 4, operation="publish")
    assert amounts == [4]
