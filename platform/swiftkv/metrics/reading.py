"""Reads what Ray's agents export, without a Prometheus server: two looks, and what happened between them.

Called by: cli/top.py. Calls: prometheus_client's parser.
"""

import json
import math
import time
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

Labels = tuple[tuple[str, str], ...]
"""Sorted, so that equal ones are equal."""

_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Look:
    """Every sample of all endpoints at one moment, by name and labels."""

    at_s: float
    samples: dict[str, dict[Labels, float]]

    def sum_by(self, name: str, *by: str, **where: str) -> dict[tuple[str, ...], float]:
        """Sums of a gauge (or of a counter so far), by the values of these labels."""
        return _sum_by(self.samples.get(name, {}), by, where)


def find_endpoints(discovery: Path) -> list[str]:
    """Addresses in the file that Ray's head writes for Prometheus. Empty while there is none."""
    try:
        groups = json.loads(discovery.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return sorted({target for group in groups for target in group["targets"]})


def look(endpoints: Iterable[str]) -> Look:
    """One look at all endpoints; those that do not answer are left out."""
    samples: dict[str, dict[Labels, float]] = {}
    with ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(_fetch, endpoints))
    at_s = time.monotonic()
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return Look(at_s, samples)


def rate_by(before: Look, after: Look, name: str, *by: str, **where: str) -> dict[tuple[str, ...], float]:
    """Per second between two looks, by the values of these labels. A counter that began again counts from 0."""
    seconds = after.at_s - before.at_s
    grown = _increase(before, after, name)
    return {key: value / seconds for key, value in _sum_by(grown, by, where).items()}


def find_quantile(before: Look, after: Look, name: str, fraction: float, **where: str) -> float | None:
    """Of what a histogram counted between two looks, as Prometheus reckons it; None if that is nothing."""
    buckets = _sum_by(_increase(before, after, f"{name}_bucket"), ("le",), where)
    edges = sorted((float(le), count) for (le,), count in buckets.items())
    total = edges[-1][1] if edges else 0.0
    if not total:
        return None
    below_edge = below = 0.0
    for edge, count in edges:
        if count >= fraction * total:
            if math.isinf(edge):
                return below_edge
            return below_edge + (edge - below_edge) * (fraction * total - below) / (count - below)
        below_edge, below = edge, count
    return below_edge


def _increase(before: Look, after: Look, name: str) -> dict[Labels, float]:
    old = before.samples.get(name, {})
    return {
        labels: value - old[labels] if labels in old and old[labels] <= value else value
        for labels, value in after.samples.get(name, {}).items()
    }


def _sum_by(series: dict[Labels, float], by: tuple[str, ...], where: dict[str, str]) -> dict[tuple[str, ...], float]:
    sums: dict[tuple[str, ...], float] = {}
    for labels, value in series.items():
        values = dict(labels)
        if where.items() <= values.items():
            key = tuple(values.get(label, "") for label in by)
            sums[key] = sums.get(key, 0.0) + value
    return sums


def _fetch(endpoint: str) -> str:
    try:
        with urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=_TIMEOUT_S) as response:
            return str(response.read().decode())
    except OSError:
        return ""
