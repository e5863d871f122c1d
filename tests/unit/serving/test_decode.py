"""What a decode replica does with the prefill pool's answers, errors and silence. Its engine is a stand-in."""

import asyncio
import json
import time
from types import SimpleNamespace

import pytest
from opentelemetry.trace import format_span_id
from ray.llm._internal.serve.core.protocol import RawRequestInfo
from ray.llm._internal.serve.engines.vllm.kv_transfer.base import DefaultConnectorBackend
from ray.serve.llm.deployment import LLMServer, PDPrefillServer
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest

from swiftkv.serving.config import HopSettings
from swiftkv.serving.decode import DecodeServer
from swiftkv.serving.hop import TOGETHER, Beginnings, HopCosts, SeenPrefixes
from swiftkv.serving.prefill import PrefillServer
from swiftkv.serving.prompts import TokenLengths, count_cached, read_prompt, tell_cached
from swiftkv.serving.workload import DecodeWorkload, PrefillWorkload

KV = {"remote_engine_id": "e", "remote_block_ids": [1]}


class PrefillPool:
    """A handle whose calls do what `behaviour` says."""

    def __init__(self, behaviour) -> None:
        self.behaviour, self.asked, self.infos, self.cancelled, self.beginnings = behaviour, [], [], 0, []

    def options(self, session_id):
        self.beginnings.append(session_id)
        return self

    @property
    def completions(self):
        return SimpleNamespace(remote=self.remote)

    def remote(self, request, info):
        self.asked.append(request)
        self.infos.append(info)
        pool, answers = self, self.behaviour()

        class Answers:
            def __aiter__(self):
                return answers

            def cancel(self):
                pool.cancelled += 1

        return Answers()


async def answer_with_kv():
    yield SimpleNamespace(kv_transfer_params=KV, usage=SimpleNamespace(prompt_tokens=400))


async def answer_with_error():
    yield SimpleNamespace(error="too long")


async def fail():
    raise ConnectionError("replica died")
    yield


async def be_silent():
    await asyncio.sleep(3600)
    yield


@pytest.fixture
def decoded(monkeypatch):
    """The requests that the engine was given."""
    requests = []

    async def completions(_self, request, _raw):
        requests.append(request)

        async def chunks():
            yield "one"
            yield "two"

        return chunks()

    monkeypatch.setattr(LLMServer, "completions", completions)
    return requests


def build_server(behaviour, **hop):
    server = DecodeServer.__new__(DecodeServer)
    server._costs = HopCosts(HopSettings(**{"min_tokens": 0, "timeout_s": 0.05, "retry_s": 60.0, **hop}))
    server._lengths, server._seen, server._application = TokenLengths(), SeenPrefixes(1 << 16), "app"
    server._avoided_until, server._asked_at, server._is_failing = 0.0, 0.0, False
    server._workload, server._beginnings = DecodeWorkload(10_000), Beginnings()
    server._prefill_handle = PrefillPool(behaviour)
    server._connector_backend_cache = DefaultConnectorBackend(None)
    return server


def build_request(**changes):
    return CompletionRequest(**{"model": "m", "prompt": "x" * 1600, "max_tokens": 5, "stream": True, **changes})


async def run(server, request, info=None):
    return [chunk async for chunk in server._pd_handle_request(request, info)]


def test_kv_of_the_prefill_pool_reaches_the_engine(decoded):
    server = build_server(answer_with_kv)
    assert asyncio.run(run(server, build_request())) == ["one", "two"]
    assert decoded[0].kv_transfer_params == KV and decoded[0].max_tokens == 5
    (asked,) = server._prefill_handle.asked
    assert asked.max_tokens == 1 and not asked.stream
    assert server._costs.remote.is_measured and server._costs.transfer.is_measured


@pytest.mark.parametrize("behaviour", [fail, be_silent])
def test_a_broken_pool_is_not_asked_again_for_a_while_and_nobody_goes_without(decoded, behaviour):
    server = build_server(behaviour)
    for _ in range(3):
        assert asyncio.run(run(server, build_request())) == ["one", "two"]
    assert len(server._prefill_handle.asked) == 1 and server._prefill_handle.cancelled == 1
    assert [request.kv_transfer_params for request in decoded] == [None] * 3


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_prompt_whose_kv_does_not_come_is_prefilled_here(monkeypatch, has_begun):
    """A whole answer that has begun, in the engine, is waited for however long it takes."""
    server = build_server(answer_with_kv, transfer_timeout_s=0.05)
    state = SimpleNamespace(external_req_id="cmpl-r-0", is_prefilling=not has_begun)
    output_processor = SimpleNamespace(request_states={"1": state})
    server.engine = SimpleNamespace(_engine_client=SimpleNamespace(output_processor=output_processor))
    dropped = []

    async def completions(_self, request, _raw):
        async def chunks():
            try:
                await asyncio.sleep(0.2 if request.kv_transfer_params else 0)
            except asyncio.CancelledError:
                dropped.append(request)
                yield "error"  # as vLLM's server answers
                return
            yield "remote" if request.kv_transfer_params else "local"

        return chunks()

    monkeypatch.setattr(LLMServer, "completions", completions)
    answer = asyncio.run(run(server, build_request(request_id="r", stream=False)))
    assert answer == ["remote" if has_begun else "local"] and len(dropped) == (not has_begun)
    asyncio.run(run(server, build_request()))
    assert len(server._prefill_handle.asked) == 1 + has_begun


def test_a_pool_that_recovered_is_asked_again(decoded):
    server = build_server(fail, retry_s=0.01)
    asyncio.run(run(server, build_request()))
    server._prefill_handle.behaviour = answer_with_kv
    asyncio.run(asyncio.sleep(0.02))
    asyncio.run(run(server, build_request()))
    assert decoded[1].kv_transfer_params == KV


def test_a_request_that_the_pool_refuses_is_judged_by_the_engine_here(decoded):
    server = build_server(answer_with_error)
    assert asyncio.run(run(server, build_request())) == ["one", "two"]
    assert asyncio.run(run(server, build_request())) == ["one", "two"]
    assert len(server._prefill_handle.asked) == 2  # the request was at fault, not the pool


def test_a_pool_that_was_slow_is_asked_again_once_in_a_while(decoded):
    server = build_server(answer_with_kv, min_tokens=None, remeasure_s=60)
    for line, seconds in ((server._costs.remote, 5.0), (server._costs.transfer, 0.1), (server._costs.local, 0.1)):
        line.add(400, seconds)
    server._asked_at = time.monotonic()
    asyncio.run(run(server, build_request(prompt="a" * 1600)))
    assert not server._prefill_handle.asked
    server._asked_at -= 61
    for letter in "bcd":
        asyncio.run(run(server, build_request(prompt=letter * 1600)))
    assert len(server._prefill_handle.asked) == 1


def test_prompts_that_begin_alike_go_to_one_replica(decoded):
    server = build_server(answer_with_kv)
    for end in ("a", "b"):
        asyncio.run(run(server, build_request(prompt="x" * 1100 + end * 300)))
    asyncio.run(run(server, build_request(prompt="y" * 1100)))
    asyncio.run(run(server, build_request(prompt="z" * 900)))
    first, second, other = server._prefill_handle.beginnings
    assert first == second != other


def test_short_prompts_stay_here(decoded):
    server = build_server(answer_with_kv, min_tokens=401)
    asyncio.run(run(server, build_request()))
    assert not server._prefill_handle.asked


def test_a_prompt_that_was_answered_here_before_needs_no_hop(decoded):
    server = build_server(answer_with_kv, min_tokens=100)
    for _ in range(2):
        asyncio.run(run(server, build_request()))
    assert len(server._prefill_handle.asked) == 1


@pytest.mark.parametrize("changes", [{"n": 2}, {"prompt": ["x" * 900, "y" * 900]}, {"prompt": [[1] * 500, [2] * 500]}])
def test_several_sequences_are_prefilled_here(decoded, changes):
    server = build_server(answer_with_kv)
    asyncio.run(run(server, build_request(**changes)))
    assert not server._prefill_handle.asked


def test_a_client_that_leaves_during_the_hop_cancels_it(decoded):
    server = build_server(be_silent, timeout_s=60.0)

    async def leave():
        task = asyncio.create_task(run(server, build_request()))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert server._prefill_handle.cancelled == 1 and not decoded
    assert (server._workload.num_running, server._workload.waiting_tokens) == (0, 0)


def test_counts_return_to_zero_when_a_stream_is_left(decoded):
    server = build_server(answer_with_kv, min_tokens=10_000)

    async def leave():
        chunks = server._pd_handle_request(build_request())
        await anext(chunks)
        assert (server._workload.num_running, server._workload.waiting_tokens) == (1, 0)
        await chunks.aclose()

    asyncio.run(leave())
    assert (server._workload.num_running, server._workload.waiting_tokens) == (0, 0)


@pytest.mark.parametrize(
    "request_, expected",
    [
        (CompletionRequest(model="m", prompt="abc"), ("abc", 0.0)),
        (CompletionRequest(model="m", prompt=[1, 2, 3]), ("1,2,3", 3.0)),
        (CompletionRequest(model="m", prompt=[[1, 2], [3]]), ("1,2\n3", 3.0)),
        (CompletionRequest(model="m", prompt=["ab", "c"]), ("ab\nc", 0.0)),
        (ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "hi"}]), ("hi", 0.0)),
    ],
)
def test_prompts_of_every_form_are_read(request_, expected):
    assert read_prompt(request_) == expected


def test_a_failing_pool_is_tried_by_one_prompt_while_others_do_not_wait(decoded):
    """A pool without replicas does not fail: it lets a prompt wait until that times out."""
    server = build_server(be_silent, retry_s=0.01)

    async def run_all():
        await run(server, build_request())
        await asyncio.sleep(0.02)
        await asyncio.gather(*(run(server, build_request()) for _ in range(5)))

    asyncio.run(run_all())
    assert len(server._prefill_handle.asked) == 2 and len(decoded) == 6
    server._prefill_handle.behaviour = answer_with_kv
    time.sleep(0.02)
    for _ in range(3):
        asyncio.run(run(server, build_request()))
    assert len(server._prefill_handle.asked) == 5, "one answer and it is asked as before"


def test_what_a_failed_pool_cost_is_not_what_prefilling_here_costs(decoded):
    server = build_server(be_silent, timeout_s=0.5)
    asyncio.run(run(server, build_request()))
    assert server._costs.local.is_measured
    assert server._costs.local.predict(400) < 0.25


def test_prompts_that_a_failing_pool_does_not_get_stay_its_demand(decoded):
    server = build_server(fail)
    for _ in range(3):
        asyncio.run(run(server, build_request()))
    stats = server._workload.report()
    assert sum(value for name, value in stats.items() if name.startswith("uncached_tokens_le_")) >= 400


def test_another_tenant_s_cache_is_not_this_one_s():
    server = build_server(answer_with_kv)
    server._seen.add("x" * 1600, "one")
    tokens = [server._measure_prompt(build_request(cache_salt=salt)).uncached for salt in ("one", "other")]
    assert tokens[0] < 100 and tokens[1] == 400


def test_a_beginning_that_all_share_does_not_keep_to_one_prefill_replica(decoded):
    server = build_server(be_silent, timeout_s=0.2)

    async def run_all(count):
        await asyncio.gather(*(run(server, build_request()) for _ in range(count)))

    asyncio.run(run_all(3 * TOGETHER))
    names = server._prefill_handle.beginnings
    assert [names.count(name) for name in dict.fromkeys(names)] == [TOGETHER] * 3
    server._prefill_handle.behaviour = answer_with_kv
    server._avoided_until = 0.0
    for _ in range(3):
        asyncio.run(run_all(1))
    assert set(names[-3:]) == {names[0]}, "one after another they go where their KV is"


def test_what_a_prefill_replica_computed_does_not_count_as_cached():
    event = {"choices": [], "usage": {"prompt_tokens": 400, "prompt_tokens_details": {"cached_tokens": 384}}}
    text = {"choices": [{"text": 'é "cached_tokens": 5'}], "usage": None}
    first, last = (f"data: {json.dumps(value, ensure_ascii=False)}\n\n" for value in (text, event))
    assert tell_cached(first, 0) == first
    told = tell_cached([first, last], 128)
    assert told[0] == first and told[1].endswith("\n\n")
    assert json.loads(told[1].removeprefix("data: "))["usage"]["prompt_tokens_details"]["cached_tokens"] == 128
    whole = SimpleNamespace(usage=SimpleNamespace(prompt_tokens_details=SimpleNamespace(cached_tokens=384)))
    assert count_cached(tell_cached(whole, 0)) == 0
    assert tell_cached("data: [DONE]\n\n", 0) == "data: [DONE]\n\n"


@pytest.mark.parametrize(("behaviour", "way"), [(answer_with_kv, "remote"), (fail, "local")])
def test_the_trace_goes_on_in_the_pool_and_in_the_engine(monkeypatch, trace, behaviour, way):
    """The engine's part says that it waits for KV only where it does."""
    infos = []

    async def completions(_self, _request, info):
        infos.append(info)

        async def chunks():
            yield "one"

        return chunks()

    monkeypatch.setattr(LLMServer, "completions", completions)
    server = build_server(behaviour)
    asyncio.run(run(server, build_request(), RawRequestInfo({"x-request-id": "r", **trace.headers})))
    decode, hop = trace.spans["decode"], trace.spans["hop"]
    assert format_span_id(decode.parent.span_id) == trace.client.span_id
    assert hop.parent.span_id == decode.context.span_id
    assert hop.attributes["swiftkv.taken"] is (way == "remote") and decode.attributes["swiftkv.way"] == way
    for info, span in ((server._prefill_handle.infos[0], hop), (infos[0], decode)):
        span_id = format_span_id(span.context.span_id)
        assert info.headers["traceparent"] == f"00-{trace.client.trace_id}-{span_id}-01"
        assert info.headers["x-request-id"] == "r"
    assert [info.headers.get("tracestate") for info in infos] == ["swiftkv=kv" if way == "remote" else None]


def test_a_client_that_leaves_during_the_hop_leaves_whole_spans(decoded, trace):
    server = build_server(be_silent, timeout_s=60.0)

    async def leave():
        task = asyncio.create_task(run(server, build_request(), RawRequestInfo(trace.headers)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert set(trace.spans) == {"decode", "hop"}


def test_the_prefill_replica_s_part_is_the_engine_s_parent(monkeypatch, trace):
    infos = []

    async def run_request(_self, _request, *, raw_request_info, **_others):
        infos.append(raw_request_info)
        return answer_with_kv()

    monkeypatch.setattr(PDPrefillServer, "_run_request", run_request)
    server = PrefillServer.__new__(PrefillServer)
    server._lengths, server._workload = TokenLengths(), PrefillWorkload(30)

    async def prefill():
        answers = await server._run_request(build_request(), raw_request_info=RawRequestInfo(trace.headers))
        return [answer async for answer in answers]

    assert len(asyncio.run(prefill())) == 1
    span = trace.spans["prefill"]
    assert format_span_id(span.parent.span_id) == trace.client.span_id
    span_id = format_span_id(span.context.span_id)
    assert infos[0].headers == {"traceparent": f"00-{trace.client.trace_id}-{span_id}-01"}
    assert dict(span.attributes) == {"swiftkv.prompt_tokens": 400, "swiftkv.computed_tokens": 400}
