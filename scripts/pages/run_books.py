"""The page of alerts: for each what it means, when it fires, what to do, and the example that its test tries.

Called by: write.py. Reads: dashboards/rules.py.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from pages.markdown import MADE, build_table, code, escape

_RULES = Path(__file__).resolve().parents[2] / "dashboards" / "rules.py"

_INTRO = """\
# Alerts and what to do

Each alert of [dashboards/rules.py](../dashboards/rules.py) with its run-book. `page` wakes someone up, `ticket` waits
for the morning. All of them are tried by promtool against series in which they must fire and series in which they must
not (`make test`). Times and shares are those of the rules as shipped; write your own beside them, not into the
generated files.
[Operating](operate.md) says how to look on from here.
"""


def load_rules() -> ModuleType:
    """dashboards/rules.py, which is no package's."""
    name = "dashboards_rules"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, _RULES)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def build_page() -> str:
    """The page."""
    rules = load_rules()
    rows = [(f"[{a.name}](#{a.name.lower()})", a.severity, escape(_say(a.summary))) for a in rules.ALERTS]
    sections = [_build_section(alert) for alert in rules.ALERTS]
    recordings = [(code(rule.name), code(rule.expr)) for rule in rules.RECORDINGS]
    return "\n".join(
        [
            MADE.format(source="dashboards/rules.py"),
            _INTRO,
            build_table(("alert", "severity", "what it says"), rows),
            *sections,
            "## Recording rules\n\nQueries that are evaluated once for all boards and alerts.\n",
            build_table(("name", "query"), recordings),
        ]
    )


def _build_section(alert: Any) -> str:
    fires = next((example for example in alert.examples if example.fires), None)
    parts = [
        f"## {alert.name}",
        f"**{alert.severity}**, after {alert.lasting} of it. {escape(_say(alert.summary))}",
        f"**What to do.** {escape(alert.run_book)}",
        f"```promql\n{alert.expr}\n```",
    ]
    if fires is not None:
        series = "\n".join(f"{name}  {values}" for name, values in fires.series.items())
        parts.append(f"Fires at {fires.at} of these series (promtool's notation, a value a minute):")
        parts.append(f"```text\n{series}\n```")
    return "\n\n".join(parts) + "\n"


def _say(summary: str) -> str:
    """Prometheus' placeholders as words in capitals."""
    for placeholder, word in (
        ("{{ $value | humanizePercentage }}", "VALUE"),
        ("{{ $value }}", "VALUE"),
        ("{{ $labels.", "{{"),
    ):
        summary = summary.replace(placeholder, word)
    while "{{" in summary:
        before, _, rest = summary.partition("{{")
        label, _, after = rest.partition(" }}")
        summary = f"{before}{label.upper()}{after}"
    return summary
