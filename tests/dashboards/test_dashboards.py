"""Boards and rules are what their code makes, name only metrics that exist, and do what their examples say."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from boards import BOARDS
from panels import UNITS, VARIABLES
from rules import ALERTS, RECORDINGS
from write import build_files

from swiftkv.metrics import METRICS
from swiftkv.metrics.foreign import FOREIGN

FOLDER = Path(__file__).parents[2] / "dashboards"
RAY_S_OWN = {"WorkerId", "NodeAddress", "SessionName", "Version", "Component", "le"}
PANELS = [(board, panel) for board in BOARDS for panel in board.panels]
EXPRESSIONS = {
    **{
        f"{board.uid}: {panel.title}, {number}": query.expr
        for board, panel in PANELS
        for number, query in enumerate(panel.queries)
    },
    **{f"{board.uid}: {title}": expr for board in BOARDS for title, expr in board.annotations.items()},
    **{rule.name: rule.expr for rule in RECORDINGS},
    **{alert.name: alert.expr for alert in ALERTS},
    **{f"variable {name}": query for name, query in VARIABLES.items()},
}
LABELS_BY_NAME = {
    **{name: set(metric.labels) for metric in METRICS.values() for name in metric.exported_names},
    **{name: set(metric.labels) for metric in FOREIGN.values() for name in metric.exported_names},
}


def test_the_files_are_what_the_code_makes():
    for path, content in build_files().items():
        assert (FOLDER / path).read_text() == content, f"{path}: run `make dashboards`"
    made = {FOLDER / path for path in build_files()}
    assert set(FOLDER.glob("grafana/*")) <= made


@pytest.mark.parametrize("expr", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_queries_name_metrics_and_labels_that_exist(expr):
    found = re.findall(r"\b(ray_\w+)(?:\{([^}]*)\})?", expr)
    recorded = set(re.findall(r"\bswiftkv:[\w:]+", expr))
    assert found or recorded
    assert recorded <= {rule.name for rule in RECORDINGS}
    for name, matchers in found:
        assert name in LABELS_BY_NAME, name
        used = set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", matchers))
        assert used <= LABELS_BY_NAME[name] | RAY_S_OWN, f"{name} has no {used - LABELS_BY_NAME[name]}"


@pytest.mark.parametrize(("board", "panel"), PANELS, ids=[f"{b.uid}: {p.title}" for b, p in PANELS])
def test_each_panel_says_its_unit_and_what_is_bad(board, panel):
    assert panel.unit in UNITS and panel.bad.endswith(".")
    variables = set(re.findall(r"\$(\w+)", " ".join(query.expr for query in panel.queries)))
    assert variables - {"__rate_interval", "__range"} <= set(board.variables)


@pytest.mark.parametrize(("board", "panel"), PANELS, ids=[f"{b.uid}: {p.title}" for b, p in PANELS])
def test_a_metric_s_suffix_and_its_panel_s_unit_agree(board, panel):
    suffixes = {
        "_seconds": {"seconds"},
        "_bytes": {"bytes"},
        "_frac": {"part"},
        "_nats": {"nats"},
        "_replicas": {"replicas"},
        "_unwritten_tokens": {"tokens"},
        "_lost_tokens_total": {"tokens"},
        "_charges_total": {"currency/h"},
        "_replica_seconds_total": {"replicas", "replica-hours/h"},
    }
    for query in panel.queries:
        for name in re.findall(r"\bray_swiftkv_\w+", query.expr):
            for suffix, units in suffixes.items():
                if name.removesuffix("_bucket").endswith(suffix):
                    assert panel.unit in units, f"{name} in {panel.unit}"


def test_all_of_ours_is_looked_at_somewhere():
    text = " ".join(EXPRESSIONS.values())
    unseen = {metric.name for metric in METRICS.values() if metric.exported_name not in text}
    assert unseen == {
        "swiftkv_arrived_prompt_tokens",  # for the policy
        "swiftkv_policy_decision_seconds",
        "swiftkv_rollout_check_ratio",
        "swiftkv_usage_records_total",
    }


def test_dashboards_have_links_variables_and_no_panel_over_another():
    uids = set()
    for path in sorted(FOLDER.glob("grafana/*.json")):
        board = json.loads(path.read_text())
        uids.add(board["uid"])
        assert board["links"] and board["templating"]["list"]
        places = [panel["gridPos"] for panel in board["panels"]]
        taken = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
        assert len(taken) == len(set(taken)), path
    assert uids == {board.uid for board in BOARDS}


@pytest.mark.parametrize(
    "command",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "recording.yml", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
)
def test_promtool_agrees(command):
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not here; on Debian it comes with the package prometheus")
    run = subprocess.run([promtool, *command], cwd=FOLDER / "prometheus", capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_each_alert_is_tried_firing_and_quiet():
    for alert in ALERTS:
        assert {example.fires for example in alert.examples} == {True, False}, alert.name
