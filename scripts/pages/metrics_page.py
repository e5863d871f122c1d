"""The reference of metrics: every series that the platform records, its labels, and what others export beside it.

Called by: write.py. Reads: swiftkv/metrics/table.py and foreign.py.
"""

from collections import defaultdict

from pages.markdown import MADE, build_table, code, escape
from swiftkv.metrics.foreign import FOREIGN
from swiftkv.metrics.table import LABELS, METRICS, Metric

_ROOMS = {
    "distill": "Distillation",
    "registry": "The registry",
    "serving/autoscaling": "The policy that sizes the pools",
    "serving/gateway": "The gateway",
    "serving/usage": "Usage records",
    "serving/rollout": "Rollouts",
    "serving": "The pools",
}
"""Beginnings of what records a metric, the longest first."""

_INTRO = """\
# Metrics

Names are as Prometheus sees them: Ray's agents export what a process recorded with `ray_` before it, on every node,
every ten seconds, and add labels of their own (`WorkerId`, `NodeAddress`, `SessionName`, `Version`, `Component`). The
unit is the end of the name: seconds, bytes, tokens, a fraction from 0 to 1 (`frac`), or nothing for a count. A
histogram has the series `…_bucket`, `…_sum` and `…_count`. The series of a process that has ended vanish.

What to look at when something is wrong: [Operating](../operate.md), and [each alert](../alerts.md).
"""


def build_page() -> str:
    """The page."""
    by_room: dict[str, list[Metric]] = defaultdict(list)
    for metric in METRICS.values():
        by_room[_find_room(metric)].append(metric)
    sections = [
        f"## {title}\n\n{build_table(('name', 'kind', 'labels', 'meaning'), map(_describe, by_room[title]))}"
        for title in dict.fromkeys(by_room)
    ]
    made = MADE.format(source="platform/swiftkv/metrics")
    return "\n".join([made, _INTRO, *sections, _build_labels(), _build_foreign()])


def _find_room(metric: Metric) -> str:
    return next((title for start, title in _ROOMS.items() if metric.recorded_by.startswith(start)), "Others")


def _describe(metric: Metric) -> tuple[str, str, str, str]:
    labels = ", ".join(code(label) for label in metric.labels)
    return code(metric.exported_name), metric.kind, labels, escape(metric.help)


def _build_labels() -> str:
    rows = [(code(name), str(label.bound), escape(label.help)) for name, label in LABELS.items()]
    intro = "How many values a label can have in one process, from which the number of series is known beforehand."
    return f"## Labels\n\n{intro}\n\n{build_table(('label', 'values at most', 'meaning'), rows)}"


def _build_foreign() -> str:
    rows = [
        (code(m.exported_name), m.kind, ", ".join(map(code, m.labels)), escape(m.help), m.seen_in)
        for m in FOREIGN.values()
    ]
    intro = (
        "What Ray and vLLM export themselves and boards, rules or the policy read, with the versions it was seen in."
    )
    return f"## Of others\n\n{intro}\n\n{build_table(('name', 'kind', 'labels used', 'meaning', 'seen in'), rows)}"
