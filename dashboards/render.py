"""A board as a picture, from the queries that Grafana is given: to look at a run where there is no Grafana.

`python dashboards/render.py swiftkv-throughput --prometheus http://127.0.0.1:9090 --minutes 10 --out throughput.png`.
Calls: dashboards/boards, Prometheus' HTTP API.
"""

import argparse
import json
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from boards import BOARDS
from panels import Board, Panel

_POINTS = 120
_COLUMNS = 3
_MOST_LINES = 10
"""In a panel; more could not be told apart."""


def draw_board(board: Board, prometheus_url: str, minutes: float, until_s: float | None = None) -> Any:
    """The figure of the last `minutes` before a time (now, where it is None).

    Raises: OSError if Prometheus does not answer, ValueError with its words if it refuses a query.
    """
    until_s = until_s or time.time()
    num_rows = -(-len(board.panels) // _COLUMNS)
    figure, axes = plt.subplots(num_rows, _COLUMNS, figsize=(6 * _COLUMNS, 3.2 * num_rows), squeeze=False)
    for axis, panel in zip(axes.flat, board.panels, strict=False):
        _draw_panel(axis, panel, prometheus_url, until_s - 60 * minutes, until_s)
    for axis in axes.flat[len(board.panels) :]:
        axis.axis("off")
    figure.suptitle(f"{board.title}, {minutes:g} minutes to {time.strftime('%Y-%m-%d %H:%M', time.localtime(until_s))}")
    figure.tight_layout()
    return figure


def query_range(prometheus_url: str, expr: str, since_s: float, until_s: float) -> list[dict[str, Any]]:
    """Prometheus' answer: labels and values of each series. Raises: as `draw_board`."""
    step_s = max(5.0, (until_s - since_s) / _POINTS)
    parameters = {"query": fill_in(expr, until_s - since_s), "start": since_s, "end": until_s, "step": step_s}
    url = f"{prometheus_url}/api/v1/query_range?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return list(json.load(response)["data"]["result"])
    except urllib.error.HTTPError as error:
        raise ValueError(f"Prometheus refuses {expr}: {error.read().decode(errors='replace')}") from None


def fill_in(expr: str, seconds: float) -> str:
    """The query with all that can be chosen chosen, and Grafana's own variables as it would have them."""
    windows = {"$__rate_interval": "1m", "$__range": f"{max(60, round(seconds))}s"}
    expr = re.sub(r"\$__\w+", lambda found: windows[found[0]], expr)
    return re.sub(r"\$\w+", ".*", expr)


def _draw_panel(axis: Any, panel: Panel, url: str, since_s: float, until_s: float) -> None:
    axis.set_title(f"{panel.title} ({panel.unit})", fontsize=10)
    found = [
        (_name(query.legend, series["metric"]), np.array(series["values"], dtype=float))
        for query in panel.queries
        for series in query_range(url, query.expr, since_s, until_s)
    ]
    found = [(name, values) for name, values in found if np.isfinite(values[:, 1]).any()]
    if not found:
        axis.text(0.5, 0.5, "nothing in this time", ha="center", va="center", color="grey", transform=axis.transAxes)
        axis.set_axis_off()
    elif panel.kind == "heat map":
        _draw_heat_map(axis, found, until_s)
    else:
        found.sort(key=lambda entry: -np.nanmax(entry[1][:, 1]))
        for name, values in found[:_MOST_LINES]:
            axis.plot((values[:, 0] - until_s) / 60, values[:, 1], label=name, linewidth=1.2)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7, loc="upper left")
        axis.set_xlabel("minutes", fontsize=8)


def _draw_heat_map(axis: Any, found: list[tuple[str, Any]], until_s: float) -> None:
    """Buckets as rows: how many values fell between one edge and the next."""
    found.sort(key=lambda entry: float(entry[0]))
    times = sorted({at for _, values in found for at in values[:, 0]})
    place = {at: index for index, at in enumerate(times)}
    up_to = np.zeros((len(found), len(times)))
    for row, (_, values) in enumerate(found):
        for at, value in values:
            up_to[row, place[at]] = value
    counts = np.diff(up_to, axis=0, prepend=0).clip(min=0)
    extent = ((times[0] - until_s) / 60, (times[-1] - until_s) / 60 + 1e-9, 0, len(found))
    axis.imshow(counts, aspect="auto", origin="lower", extent=extent, cmap="viridis", interpolation="nearest")
    axis.set_yticks(np.arange(1, len(found) + 1), [name for name, _ in found], fontsize=7)
    axis.set_xlabel("minutes", fontsize=8)


def _name(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), legend).strip() or "all"


def main() -> None:
    """The command."""
    boards = {board.uid: board for board in BOARDS}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("board", choices=boards)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="URL of the Prometheus server")
    parser.add_argument("--minutes", type=float, default=15, help="how far to look back")
    parser.add_argument("--out", type=Path, required=True, help="the picture's file (png or svg)")
    given = parser.parse_args()
    try:
        draw_board(boards[given.board], given.prometheus.rstrip("/"), given.minutes).savefig(given.out, dpi=110)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {given.prometheus}: {error}")
    print(given.out)


if __name__ == "__main__":
    main()
