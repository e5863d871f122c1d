"""Writes the files that Prometheus and Grafana read, from the code beside it: `make dashboards`.

Calls: dashboards/rules.py, dashboards/boards, dashboards/grafana.py.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))

from boards import BOARDS
from grafana import build_dashboard
from rules import ALERTS, RECORDINGS, Alert, Example

FOLDER = Path(__file__).parent
_MADE = "# Made by `make dashboards` from dashboards/*.py: do not edit.\n"
_INTERVAL = "10s"
"""Of scrapes and rules: Ray's agents export every 10 s."""


def build_files() -> dict[str, str]:
    """The content of each file, by its path below dashboards/."""
    recordings = [{"record": rule.name, "expr": rule.expr} for rule in RECORDINGS]
    alerts = [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.lasting,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "run_book": alert.run_book},
        }
        for alert in ALERTS
    ]
    files = {
        "prometheus/recording.yml": _dump({"groups": [_build_group("swiftkv_recording", recordings)]}),
        "prometheus/alerts.yml": _dump({"groups": [_build_group("swiftkv_alerts", alerts)]}),
        "prometheus/alerts_test.yml": _dump(
            {
                "rule_files": ["recording.yml", "alerts.yml"],
                "evaluation_interval": "1m",
                "tests": [_build_test(alert, example) for alert in ALERTS for example in alert.examples],
            }
        ),
    }
    for board in BOARDS:
        files[f"grafana/{board.uid}.json"] = json.dumps(build_dashboard(board), indent=1, sort_keys=True) + "\n"
    return files


def _build_group(name: str, rules: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": name, "interval": _INTERVAL, "rules": rules}


def _build_test(alert: Alert, example: Example) -> dict[str, Any]:
    return {
        "interval": "1m",
        "name": f"{alert.name}, {'fires' if example.fires else 'is quiet'}",
        "input_series": [{"series": series, "values": values} for series, values in example.series.items()],
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertname="{alert.name}", alertstate="firing"}})',
                "eval_time": example.at,
                "exp_samples": [{"labels": "{}", "value": 1}] if example.fires else [],
            }
        ],
    }


def _dump(value: Any) -> str:
    return _MADE + yaml.safe_dump(value, sort_keys=False, width=1000, allow_unicode=True)


if __name__ == "__main__":
    for path, content in build_files().items():
        target = FOLDER / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content, encoding="utf-8")
        print(target.relative_to(FOLDER.parent))
