"""Every metric that the platform exports, and the ways to record into it. Does not scrape, store or draw."""

from swiftkv.metrics.recording import count, observe, record
from swiftkv.metrics.table import METRICS, Metric

__all__ = ["METRICS", "Metric", "count", "observe", "record"]
