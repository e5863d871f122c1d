"""The table of metrics: names, labels, and that each row is recorded where it says."""

from pathlib import Path

import pytest

from swiftkv.metrics import METRICS, record
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
    gateway = [metric for metric in METRICS.values() if "tenant" in metric.labels and "phase" not in metric.labels]
    assert len(gateway) == 9
    assert sum(metric.count_series(**used) for metric in gateway) < 70_000


def test_a_thousand_tenants_have_fewer_series_than_is_said_in_a_replica() -> None:
    """Those of its engine's seconds, in three phases; a hundred replicas then have fewer than 400,000."""
    replica = METRICS["swiftkv_replica_seconds_total"]
    assert replica.count_series(tenant=1000) <= 4000


def test_wrong_labels_and_unknown_names_are_our_bugs() -> None:
    with pytest.raises(KeyError):
        record("swiftkv_nothing", 1)
    with pytest.raises(AssertionError, match="has labels"):
        record("swiftkv_distill_step", 1, model="x")
