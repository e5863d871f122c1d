"""A Prometheus server of a test's own, and what is asked of it. Called by: tests/integration."""

import json
import math
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import yaml
from render import fill_in

from swiftkv.cluster import choose_ports

SHIPPED = Path(__file__).parents[1] / "dashboards" / "prometheus"


class Prometheus:
    """What it has scraped."""

    def __init__(self, url):
        self.url = url

    def query(self, expr, at_s=None):
        """Value by labels, at this moment or an earlier one."""
        found = self._ask("query", query=expr, **({} if at_s is None else {"time": at_s}))
        return {tuple(sorted(item["metric"].items())): float(item["value"][1]) for item in found["result"]}

    def total(self, name, **labels):
        """A counter, all processes together, 0 before it is there."""
        matchers = ",".join(f'{label}="{value}"' for label, value in labels.items())
        return sum(self.query(f"sum({name}{{{matchers}}})").values())

    def measure_area(self, expr, since_s, until_s):
        """Under the curve of each series that a panel draws, by its labels: what was counted, where it is a rate.

        A step of the counter is in the rates of one window's length, so nothing may happen for as long at both ends.
        """
        found = self._ask("query_range", query=fill_in(expr, 60), start=since_s, end=until_s, step=1)
        return {
            tuple(sorted(series["metric"].items())): sum(float(value) for _, value in series["values"])
            for series in found["result"]
        }

    def list_names(self):
        """Of all series that there are."""
        return set(self._ask("label/__name__/values"))

    def list_series(self, name):
        """Labels of each of a metric's series."""
        return self._ask("series", **{"match[]": name})

    def list_targets(self):
        """What it scrapes, and how it is."""
        return self._ask("targets")["activeTargets"]

    def _ask(self, path, **parameters):
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=20) as response:
            return json.load(response)["data"]


@contextmanager
def run_prometheus(folder, config):
    """One with this configuration and the shipped rules.

    It looks as often as rules are evaluated and as Ray exports: where one of the three differs from the others, a rate
    over a minute is up to a tenth off, always to the same side.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in config["rule_files"]:
        shutil.copy(SHIPPED / name, folder / name)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (port,) = choose_ports(1)
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    with (folder / "prometheus.log").open("wb") as log:
        server = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while not _is_ready(port):
                assert time.monotonic() < deadline and server.poll() is None, (folder / "prometheus.log").read_text()
                time.sleep(0.2)
            yield Prometheus(f"http://127.0.0.1:{port}")
        finally:
            server.terminate()
            server.wait()


@contextmanager
def watch(cluster, folder):
    """One with the shipped configuration before this cluster; None where Prometheus is not installed."""
    if not shutil.which("prometheus"):
        yield None
        return
    config = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
    discovery = cluster.folder / "r" / "prom_metrics_service_discovery.json"
    config["scrape_configs"][0]["file_sd_configs"] = [{"files": [str(discovery)], "refresh_interval": "5s"}]
    with run_prometheus(folder, config) as prometheus:
        yield prometheus


def list_queries(board, titles):
    """Those of a board's panels with these titles."""
    panels = [panel for panel in board.panels if panel.title in titles]
    assert len(panels) == len(titles)
    return [query.expr for panel in panels for query in panel.queries]


def wait_for_answers(prometheus, queries, timeout_s=90, finite=False):
    """Until each has one, all at one moment; `finite`: one that can be drawn, which a quantile of nothing cannot."""
    deadline = time.monotonic() + timeout_s
    test = math.isfinite if finite else lambda value: True
    while empty := [expr for expr in queries if not any(map(test, prometheus.query(fill_in(expr, 300)).values()))]:
        assert time.monotonic() < deadline, f"no series: {empty}"
        time.sleep(1)


def _is_ready(port):
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=2).close()
    except (urllib.error.URLError, OSError):
        return False
    return True
