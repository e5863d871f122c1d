"""Every metric that the platform exports, and the ways to record into it. Does not scrape, store or draw."""

from swiftkv.metrics.recording import METERING_KEY, count, is_metering, observe, record
from swiftkv.metrics.table import METRICS, Metric

__all__ = ["METERING_KEY", "METRICS", "Metric", "count", "is_metering", "observe", "record"]
