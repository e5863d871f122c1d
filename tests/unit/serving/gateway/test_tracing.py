"""The gateway's span of a request: in the client's trace, with what the log line says, without text."""

import asyncio

import pytest
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id

SECRET = "tell-nobody"


def post(world, headers=None, path="/v1/completions", **body):
    async def send():
        async with world.connect() as client:
            values = {"model": "tiny", "prompt": SECRET, "max_tokens": 3, **body}
            return await client.post(path, json=values, headers=headers)

    return asyncio.run(send())


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_span_with_its_queue_and_its_version_goes_on_with_it(make_world, trace, stream):
    world = make_world()
    answer = post(world, {**trace.headers, "x-request-id": "mine"}, stream=stream)
    assert answer.status_code == 200
    gateway, queue = trace.spans["gateway"], trace.spans["queue"]
    assert format_trace_id(gateway.context.trace_id) == trace.client.trace_id
    assert format_span_id(gateway.parent.span_id) == trace.client.span_id
    assert queue.parent.span_id == gateway.context.span_id and gateway.kind is SpanKind.SERVER
    (call,) = world.version.calls
    span_id = format_span_id(gateway.context.span_id)
    assert call.headers["traceparent"] == f"00-{trace.client.trace_id}-{span_id}-01"
    attributes = dict(gateway.attributes)
    times = {name: attributes.pop(f"swiftkv.{name}") for name in ("queue_s", "total_s")}
    assert all(value >= 0 for value in times.values())
    assert ("swiftkv.ttft_s" in attributes) is stream
    assert {name: value for name, value in attributes.items() if not name.endswith("_s")} == {
        "swiftkv.request_id": "mine",
        "swiftkv.route": "POST /v1/completions",
        "swiftkv.tenant": "anonymous",
        "swiftkv.model": "tiny",
        "swiftkv.application": "tiny-1",
        "swiftkv.status": 200,
        "swiftkv.prompt_tokens": 7,
        "swiftkv.cached_tokens": 2,
        "swiftkv.completion_tokens": 3,
    }
    text = trace.read_text()
    assert SECRET not in text and "Hello" not in text and "world" not in text


def test_a_malformed_traceparent_changes_no_answer(make_world, trace):
    assert post(make_world(), {"traceparent": "00-nonsense"}).status_code == 200
    assert trace.spans["gateway"].parent is None


@pytest.mark.parametrize(
    ("failure", "body", "status", "reason", "expected"),
    [
        (None, {"model": "absent"}, 404, "model_not_found", StatusCode.UNSET),
        (RuntimeError(SECRET), {}, 500, "server_error", StatusCode.ERROR),
    ],
)
def test_what_was_not_answered_says_why(make_world, trace, failure, body, status, reason, expected):
    world = make_world()
    world.version.fail_first = [failure, failure] if failure else []
    assert post(world, **body).status_code == status
    gateway = trace.spans["gateway"]
    assert (gateway.attributes["swiftkv.status"], gateway.attributes["swiftkv.reason"]) == (status, reason)
    assert gateway.status.status_code is expected
    assert SECRET not in trace.read_text()


def test_a_stream_that_breaks_off_has_failed(make_world, trace):
    world = make_world()
    world.version.ends_after = 1
    assert post(world, stream=True).status_code == 200
    assert trace.spans["gateway"].status.status_code is StatusCode.ERROR


def test_looks_at_its_health_leave_no_spans(make_world, trace):
    async def look():
        async with make_world().connect() as client:
            return [(await client.get(path)).status_code for path in ("/health", "/ready", "/v1/models")]

    assert asyncio.run(look()) == [200, 200, 200]
    assert list(trace.spans) == ["gateway"]
    assert trace.spans["gateway"].attributes["swiftkv.route"] == "GET /v1/models"


def test_a_gateway_that_does_not_trace_passes_no_trace_on(make_world):
    world = make_world()
    assert post(world, {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}).status_code == 200
    assert "traceparent" not in world.version.calls[0].headers
