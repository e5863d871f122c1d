"""Spans of requests: one trace through gateway, prefill and decode. Off unless the environment names an endpoint.

While it is off nothing of OpenTelemetry is imported, and what is called here returns at once. Spans never hold text of
a prompt or an answer.
Called by: the gateway, serving/decode.py, serving/prefill.py, serving/engine.py. Calls: serving/spans.py, if it is on.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from swiftkv.serving.spans import Recorder

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""OpenTelemetry's own variables, either of which switches tracing on. Its SDK reads their values and all others."""

_recorder: "Recorder | None" = None
"""None while tracing is off."""


class Span:
    """One step of a request. This one is of a process that does not trace: it does nothing."""

    def begin(self, name: str, is_call: bool = False) -> "Span":
        """A step within this one. `is_call`: another process does it."""
        return self

    def note(self, **facts: Any) -> None:
        """Adds attributes; None is left out."""

    def list_headers(self) -> dict[str, str]:
        """HTTP headers by which another process takes part in the trace, within this step."""
        return {}

    def pass_on(self, info: Any, has_kv: bool = False) -> Any:
        """Ray's RawRequestInfo with these headers. `has_kv`: an engine is given KV that it has to wait for."""
        return info

    def end(self, facts: Mapping[str, Any] | None = None, is_failed: bool = False) -> None:
        """The step is over, with these attributes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        self.end(is_failed=isinstance(error, Exception))  # a client that leaves is no failure


NOTHING = Span()


def start() -> bool:
    """Switches tracing on in this replica if the environment asks for it; returns whether it is on.

    Raises: ConfigError if the environment names a protocol that there is not.
    """
    global _recorder
    if _recorder is None and any(os.environ.get(name) for name in _ENDPOINTS):
        from swiftkv.serving.spans import build_recorder

        _recorder = build_recorder()
    return _recorder is not None


def begin_span(name: str, headers: Mapping[str, str] | None) -> Span:
    """A step of this process, in the trace that a request's headers name, or in a new one."""
    return NOTHING if _recorder is None else _recorder.begin(name, headers or {})


def trace_engine(client: Any) -> None:
    """Lets a vLLM engine make a span of each of its requests, which is then sent like ours.

    vLLM's own switch, `otlp_traces_endpoint`, would add a provider beside ours that knows fewer of the variables: no
    common protocol, no TLS over gRPC (vLLM 0.29, tracing/otel.py).
    """
    client.observability_config.otlp_traces_endpoint = "as the environment says"
    client.output_processor.tracing_enabled = True


def stop() -> None:
    """Sends what has not been sent. Takes as long as OpenTelemetry waits for an endpoint that is down, 30 s at most."""
    if _recorder is not None:
        _recorder.stop()
