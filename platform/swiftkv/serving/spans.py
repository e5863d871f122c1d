"""Spans in OpenTelemetry's form, sent in the background by its SDK, which reads its own environment variables.

Ray Serve 2.60 can trace too, but by variables of its own, and not into the engine. vLLM makes the spans of an engine's
requests itself (`llm_request`), in this process and through the provider that is set here.
Called by: serving/tracing.py, only where tracing is on. Calls: OpenTelemetry's SDK.
"""

import os
from collections.abc import Mapping
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import NonRecordingSpan, NoOpTracer, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from ray import serve
from ray.llm._internal.serve.core.protocol import RawRequestInfo

from swiftkv.errors import ConfigError
from swiftkv.serving.tracing import Span

ENGINE_SPAN = "llm_request"
"""vLLM's name for the span of one request in one engine."""

_PREFIX = "swiftkv."
_KV_KEY, _KV_VALUE = "swiftkv", "kv"
"""In W3C's `tracestate`, which vLLM hands from a request to its span: the request brings KV."""

_PROTOCOL, _COMMON_PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"
_UNNAMED = "unknown_service"
"""How the SDK's name of a service begins to which the environment gives none."""

_propagator = TraceContextTextMapPropagator()  # vLLM reads no other


class RecordedSpan(Span):
    """One step of a request."""

    def __init__(self, tracer: Tracer, name: str, context: Context, kind: SpanKind) -> None:
        self._tracer = tracer
        self._span = tracer.start_span(name, context, kind)

    def begin(self, name: str, is_call: bool = False) -> Span:
        """As in `Span`."""
        kind = SpanKind.CLIENT if is_call else SpanKind.INTERNAL
        return RecordedSpan(self._tracer, name, set_span_in_context(self._span), kind)

    def note(self, **facts: Any) -> None:
        """As in `Span`."""
        self._span.set_attributes({_PREFIX + name: value for name, value in facts.items() if value is not None})

    def list_headers(self) -> dict[str, str]:
        """As in `Span`."""
        headers: dict[str, str] = {}
        _propagator.inject(headers, set_span_in_context(self._span))
        return headers

    def pass_on(self, info: Any, has_kv: bool = False) -> Any:
        """As in `Span`."""
        headers = self.list_headers()
        if has_kv:
            headers["tracestate"] = ",".join([f"{_KV_KEY}={_KV_VALUE}", *filter(None, [headers.get("tracestate")])])
        return RawRequestInfo({**(info.headers if info is not None else {}), **headers})

    def end(self, facts: Mapping[str, Any] | None = None, is_failed: bool = False) -> None:
        """As in `Span`."""
        self.note(**(facts or {}))
        if is_failed:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


class Recorder:
    """What begins the spans of one process."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("swiftkv")
        provider.add_span_processor(_Transfers(self._tracer))

    def begin(self, name: str, headers: Mapping[str, str]) -> Span:
        """A span in the trace that the headers name; in a new one if they name none, or not as W3C has it."""
        return RecordedSpan(self._tracer, name, _propagator.extract(headers), SpanKind.SERVER)

    def stop(self) -> None:
        """Sends what has not been sent; spans that end later are dropped."""
        self._provider.shutdown()


class _Transfers(SpanProcessor):
    """Draws the wait for KV, which vLLM's span of a request that brings some only tells in seconds.

    vLLM schedules such a request when its KV has come (vLLM 0.29), so that its time in the queue is the transfer and,
    where the engine is full, the wait for a turn; what vLLM publishes does not tell these two apart.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def on_end(self, span: ReadableSpan) -> None:
        """OpenTelemetry's hook. Must not raise: vLLM's loop over all requests is what ends its spans."""
        if span.name != ENGINE_SPAN or span.context is None or _KV_KEY not in span.context.trace_state:
            return
        attributes: Any = span.attributes or {}
        names = ("time_to_first_token", "time_in_model_prefill", "time_in_queue")
        first_s, computing_s, waiting_s = (attributes.get(f"gen_ai.latency.{name}") for name in names)
        if span.start_time is None or None in (first_s, computing_s, waiting_s):
            return
        scheduled_ns = span.start_time + int((first_s - computing_s) * 1e9)
        begun_ns = scheduled_ns - int(waiting_s * 1e9)
        within = set_span_in_context(NonRecordingSpan(span.context))
        facts = {f"{_PREFIX}includes": "wait for a turn in the engine"}
        self._tracer.start_span("kv_transfer", within, attributes=facts, start_time=begun_ns).end(scheduled_ns)


def build_recorder() -> Recorder | None:
    """That of this replica, whose provider becomes the process's; None if OTEL_SDK_DISABLED says so.

    Raises: ConfigError if the environment names a protocol that there is not.
    """
    provider = TracerProvider(resource=_describe_replica())
    if isinstance(provider.get_tracer("swiftkv"), NoOpTracer):
        return None
    provider.add_span_processor(BatchSpanProcessor(_build_exporter()))
    trace.set_tracer_provider(provider)
    return Recorder(provider)


def _describe_replica() -> Resource:
    replica = serve.get_replica_context()
    named = {f"{_PREFIX}application": replica.app_name, f"{_PREFIX}deployment": replica.deployment}
    resource = Resource.create({**named, SERVICE_INSTANCE_ID: replica.replica_tag})
    if str(resource.attributes[SERVICE_NAME]).startswith(_UNNAMED):
        return resource.merge(Resource({SERVICE_NAME: "swiftkv"}))
    return resource


def _build_exporter() -> SpanExporter:
    """The SDK's; which of the two is all that it leaves to whoever makes one."""
    protocol = (os.environ.get(_PROTOCOL) or os.environ.get(_COMMON_PROTOCOL) or "grpc").strip()
    # The engine's process, where vLLM traces how it is loaded, reads this variable alone (vLLM 0.29, tracing/otel.py).
    os.environ[_PROTOCOL] = protocol
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter()
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter()
    raise ConfigError(f"{_COMMON_PROTOCOL} or {_PROTOCOL} is {protocol!r}; it can be grpc or http/protobuf.")
