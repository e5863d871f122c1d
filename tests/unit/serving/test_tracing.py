"""Spans of one process: off without OpenTelemetry, on by its variables, drawn where vLLM only tells seconds."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from ray.llm._internal.serve.core.protocol import RawRequestInfo

from swiftkv.errors import ConfigError
from swiftkv.serving import spans, tracing
from swiftkv.serving.tracing import NOTHING

NOBODY_LISTENS = "http://127.0.0.1:9"

OFF = """
import sys
from swiftkv.serving import tracing
assert not tracing.start()
with tracing.begin_span("gateway", {"traceparent": "x"}) as span, span.begin("queue") as queue:
    queue.note(a=1)
tracing.stop()
assert span is queue is tracing.NOTHING
assert not any(name.partition(".")[0] == "opentelemetry" for name in sys.modules)
"""


@pytest.fixture
def environment(monkeypatch):
    """Sets OpenTelemetry's variables, in what looks like a replica; what was started is stopped."""
    for name in [name for name in spans.os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    replica = SimpleNamespace(app_name="pair", deployment="Decode:tiny", replica_tag="abc")
    monkeypatch.setattr(spans.serve, "get_replica_context", lambda: replica)
    monkeypatch.setattr(spans.trace, "set_tracer_provider", lambda provider: None)
    monkeypatch.setattr(tracing, "_recorder", None)
    monkeypatch.setenv(spans._PROTOCOL, "")  # is set where tracing starts; taken back after the test

    def set_all(**values):
        for name, value in values.items():
            monkeypatch.setenv(f"OTEL_{name}", value)

    yield set_all
    tracing.stop()


def test_nothing_of_opentelemetry_is_loaded_while_tracing_is_off():
    environment = {name: value for name, value in spans.os.environ.items() if not name.startswith("OTEL_")}
    result = subprocess.run([sys.executable, "-c", OFF], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_process_that_does_not_trace_passes_requests_on_as_they_are():
    info = RawRequestInfo({"traceparent": "of a client"})
    span = tracing.begin_span("decode", info.headers)
    assert span is NOTHING and span.begin("hop", is_call=True) is NOTHING
    assert span.pass_on(info, has_kv=True) is info and span.pass_on(None) is None
    assert span.list_headers() == {}


def test_without_an_endpoint_nothing_starts(environment):
    environment(SERVICE_NAME="somebody", TRACES_SAMPLER="always_on")
    assert not tracing.start()


@pytest.mark.parametrize("name", ["EXPORTER_OTLP_ENDPOINT", "EXPORTER_OTLP_TRACES_ENDPOINT"])
@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_an_endpoint_that_is_down_neither_fails_nor_slows_requests(environment, name, protocol):
    environment(**{name: NOBODY_LISTENS, "EXPORTER_OTLP_PROTOCOL": protocol, "EXPORTER_OTLP_TIMEOUT": "1"})
    environment(BSP_MAX_QUEUE_SIZE="64", BSP_MAX_EXPORT_BATCH_SIZE="32")
    assert tracing.start() and tracing.start()
    began_s = time.monotonic()
    for _ in range(500):  # more than are kept
        with tracing.begin_span("gateway", {}) as span:
            span.begin("queue").end()
    assert time.monotonic() - began_s < 0.5
    assert spans.os.environ[spans._PROTOCOL] == protocol
    began_s = time.monotonic()
    tracing.stop()
    assert time.monotonic() - began_s < 35


def test_a_protocol_that_there_is_not_is_named(environment):
    environment(EXPORTER_OTLP_ENDPOINT=NOBODY_LISTENS, EXPORTER_OTLP_PROTOCOL="smoke")
    with pytest.raises(ConfigError, match="'smoke'; it can be grpc or http/protobuf"):
        tracing.start()


def test_the_sdk_can_be_disabled(environment):
    environment(EXPORTER_OTLP_ENDPOINT=NOBODY_LISTENS, SDK_DISABLED="true")
    assert not tracing.start()


def test_the_sampler_is_the_environment_s(environment):
    environment(EXPORTER_OTLP_ENDPOINT=NOBODY_LISTENS, EXPORTER_OTLP_PROTOCOL="http/protobuf")
    environment(TRACES_SAMPLER="always_off")
    assert tracing.start()
    _, _, _, flags = tracing.begin_span("gateway", {}).list_headers()["traceparent"].split("-")
    assert not int(flags, 16) & 1  # sampled


@pytest.mark.parametrize(
    ("values", "expected"),
    [({}, "swiftkv"), ({"SERVICE_NAME": "llm"}, "llm"), ({"RESOURCE_ATTRIBUTES": "service.name=llm"}, "llm")],
)
def test_the_service_s_name_is_the_environment_s_or_ours(environment, values, expected):
    environment(**values)
    resource = spans._describe_replica().attributes
    assert resource["service.name"] == expected and resource["service.instance.id"] == "abc"
    assert (resource["swiftkv.application"], resource["swiftkv.deployment"]) == ("pair", "Decode:tiny")


def test_steps_are_within_each_other_and_in_the_client_s_trace(trace):
    with tracing.begin_span("decode", trace.headers) as span, span.begin("hop", is_call=True) as hop:
        hop.note(taken=True, reason=None)
        headers = hop.list_headers()
    decode, hop = trace.spans["decode"], trace.spans["hop"]
    assert format_span_id(decode.parent.span_id) == trace.client.span_id
    assert hop.parent.span_id == decode.context.span_id
    assert (decode.kind, hop.kind) == (SpanKind.SERVER, SpanKind.CLIENT)
    assert dict(hop.attributes) == {"swiftkv.taken": True}
    assert headers == {"traceparent": f"00-{trace.client.trace_id}-{format_span_id(hop.context.span_id)}-01"}


@pytest.mark.parametrize(
    "given",
    [
        "",
        "x",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01" + "0" * 1000,
    ],
)
def test_a_malformed_traceparent_is_ignored(trace, given):
    tracing.begin_span("gateway", {"traceparent": given, "tracestate": "a=b"}).end()
    span = trace.spans["gateway"]
    assert span.parent is None and format_trace_id(span.context.trace_id) != trace.client.trace_id


@pytest.mark.parametrize(("error", "expected"), [(ValueError, StatusCode.ERROR), (GeneratorExit, StatusCode.UNSET)])
def test_errors_are_told_without_their_text_and_a_client_that_leaves_is_none(trace, error, expected):
    with pytest.raises(error), tracing.begin_span("queue", {}):
        raise error("the prompt was: hello")
    assert trace.spans["queue"].status.status_code is expected
    assert "hello" not in trace.read_text()


@pytest.mark.parametrize("has_kv", [True, False])
def test_the_wait_for_kv_is_drawn_from_what_vllm_tells(trace, has_kv):
    """As long as its time in the queue, up to when it was scheduled; only where KV came from elsewhere."""
    given = RawRequestInfo({"x-request-id": "r", **trace.headers, "tracestate": "of=somebody"})
    passed = tracing.begin_span("decode", given.headers).pass_on(given, has_kv)
    assert passed.headers["x-request-id"] == "r"
    assert passed.headers["tracestate"] == ("swiftkv=kv," if has_kv else "") + "of=somebody"
    end_engine_span(trace, passed.headers, time_to_first_token=0.5, time_in_model_prefill=0.1, time_in_queue=0.3)
    engine = trace.spans["llm_request"]
    assert ("kv_transfer" in trace.spans) is has_kv
    if has_kv:
        transfer = trace.spans["kv_transfer"]
        assert transfer.parent.span_id == engine.context.span_id
        assert transfer.start_time == engine.start_time + 100_000_000
        assert transfer.end_time == engine.start_time + 400_000_000
        assert transfer.attributes["swiftkv.includes"] == "wait for a turn in the engine"


def test_a_span_of_vllm_s_without_those_seconds_fails_nothing(trace):
    end_engine_span(trace, tracing.begin_span("decode", {}).pass_on(None, has_kv=True).headers, time_in_queue=0.3)
    assert list(trace.spans) == ["llm_request"]


def end_engine_span(trace, headers, **seconds):
    """As vLLM 0.29 does."""
    context = TraceContextTextMapPropagator().extract(headers)
    attributes = {f"gen_ai.latency.{name}": value for name, value in seconds.items()}
    tracer = trace.provider.get_tracer("vllm.tracing.otel")
    tracer.start_span("llm_request", context, SpanKind.SERVER, attributes, start_time=1_000_000_000_000).end()
