"""What the serving tests share: a process that traces, and what its spans are."""

from types import SimpleNamespace

import pytest

from swiftkv.serving import tracing

CLIENT = SimpleNamespace(trace_id="0af7651916cd43dd8448eb211c80319c", span_id="b7ad6b7169203331")
"""A span of a client's, and its trace."""


class Trace:
    """Spans that have ended, in this process."""

    client = CLIENT

    def __init__(self, provider, exporter):
        self.headers = {"traceparent": f"00-{CLIENT.trace_id}-{CLIENT.span_id}-01"}
        self.provider, self._exporter = provider, exporter

    @property
    def spans(self):
        """By their names, of which each is there once."""
        spans = {span.name: span for span in self._exporter.get_finished_spans()}
        assert len(spans) == len(self._exporter.get_finished_spans())
        return spans

    def read_text(self):
        """All that is sent of them."""
        return "".join(span.to_json() for span in self._exporter.get_finished_spans())


@pytest.fixture
def trace(monkeypatch):
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from swiftkv.serving.spans import Recorder

    provider, exporter = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_recorder", Recorder(provider))
    return Trace(provider, exporter)
