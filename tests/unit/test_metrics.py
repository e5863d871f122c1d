"""The table of metrics: names, labels, and that each row is recorded where it says."""

from pathlib import Path

import pytest

from swiftkv.metrics import METRICS, record

PACKAGE = Path(__file__).parents[2] / "platform" / "swiftkv"


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_each_metric_is_recorded_where_the_table_says(metric) -> None:
    assert metric.name.startswith("swiftkv_")
    assert f'"{metric.name}"' in (PACKAGE / metric.recorded_by).read_text()


def test_wrong_labels_and_unknown_names_are_our_bugs() -> None:
    with pytest.raises(KeyError):
        record("swiftkv_nothing", 1)
    with pytest.raises(AssertionError, match="has labels"):
        record("swiftkv_distill_step", 1, model="x")
