"""A board as Grafana 11 reads it, through Grafana's Foundation SDK.

Called by: dashboards/write.py. Calls: dashboards/panels.py.
"""

import json
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    VariableRefresh,
)
from panels import UNITS, VARIABLES, Board, Panel

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG = "swiftkv"
_HEIGHT = 8


def build_dashboard(board: Board) -> dict[str, Any]:
    """The dashboard as JSON. The same board gives the same JSON."""
    builder = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .tags([TAG])
        .timezone("browser")
        .time("now-30m", "now")
        .refresh("10s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("SwiftKV")
            .type(DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(True)
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    for name in board.variables:
        builder = builder.with_variable(
            dashboard.QueryVariable(name)
            .datasource(SOURCE)
            .query(VARIABLES[name])
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    for title, query in board.annotations.items():
        builder = builder.annotation(
            dashboard.AnnotationQuery().name(title).datasource(SOURCE).enable(True).icon_color("blue").expr(query)
        )
    for title, panels in board.rows.items():
        builder = builder.with_row(dashboard.Row(title))
        for panel in panels:
            builder = builder.with_panel(_build_panel(panel))
    return json.loads(JSONEncoder(sort_keys=True).encode(builder.build()))


def _build_panel(panel: Panel) -> Any:
    kinds = {"lines": _build_lines, "number": _build_number, "heat map": _build_heat_map}
    builder = (
        kinds[panel.kind]()
        .title(panel.title)
        .description(panel.bad)
        .datasource(SOURCE)
        .unit(UNITS[panel.unit])
        .span(panel.width)
        .height(_HEIGHT)
    )
    for query in panel.queries:
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend)
        builder = builder.with_target(target.format("heatmap") if panel.kind == "heat map" else target)
    return builder


def _build_lines() -> Any:
    return timeseries.Panel().fill_opacity(10).axis_soft_min(0)


def _build_number() -> Any:
    return stat.Panel().reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))


def _build_heat_map() -> Any:
    return heatmap.Panel()
