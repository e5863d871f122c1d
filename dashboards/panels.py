"""What a board is made of, as data. Read by: dashboards/grafana.py, and whoever runs the queries."""

from dataclasses import dataclass, field
from typing import Literal

VARIABLES = {
    "model": "label_values(ray_swiftkv_gateway_requests_total, model)",
    "tenant": "label_values(ray_swiftkv_gateway_requests_total, tenant)",
    "application": "label_values(swiftkv:replica:info, application)",
    "pool": "label_values(swiftkv:replica:info, pool)",
    "replica": 'label_values(swiftkv:replica:info{application=~"$application"}, replica)',
    "run": "label_values(ray_swiftkv_distill_step, run)",
}
"""What can be chosen above a board, and the query for the choices. Any number of each, all at first."""

UNITS = {
    "tokens/s": "short",
    "requests/s": "reqps",
    "replicas": "short",
    "replica-hours/h": "short",
    "currency/h": "short",
    "tokens": "short",
    "sequences": "short",
    "prompts/s": "short",
    "seconds": "s",
    "bytes/s": "Bps",
    "bytes": "bytes",
    "FLOP/s": "flops",
    "part": "percentunit",
    "per cent": "percent",
    "nats": "short",
    "steps": "short",
    "number": "short",
    "series": "short",
}
"""Units of panels, and what Grafana calls them."""


@dataclass(frozen=True)
class Query:
    """A PromQL expression, and what its series are called."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """One picture."""

    title: str
    unit: str
    bad: str
    """One sentence on what a bad value means."""
    queries: tuple[Query, ...]
    kind: Literal["lines", "number", "heat map"] = "lines"
    width: int = 8
    """Of 24."""


@dataclass(frozen=True)
class Board:
    """One page."""

    uid: str
    title: str
    variables: tuple[str, ...]
    rows: dict[str, tuple[Panel, ...]] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    """Marks on the time axis: a name, and a query that is 1 where one belongs."""

    @property
    def panels(self) -> tuple[Panel, ...]:
        """Of all rows."""
        return tuple(panel for panels in self.rows.values() for panel in panels)
