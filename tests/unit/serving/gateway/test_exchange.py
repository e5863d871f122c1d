"""What remains of requests as metrics: by tenant, model and version, with their times and what counts as good."""

import asyncio
import time
from collections import Counter

import pytest

from swiftkv import metrics
from swiftkv.serving.gateway.exchange import Exchange, Usage
from swiftkv.serving.gateway.settings import Targets

GOOD = "swiftkv_gateway_good_requests_total"


@pytest.fixture
def recorded(monkeypatch):
    """Sums of counters and values of histograms, by name and labels."""
    found = {"counts": Counter(), "values": {}}

    def count(name, amount, **labels):
        found["counts"][name, *sorted(labels.items())] += amount

    def observe(name, value, **labels):
        found["values"].setdefault((name, *sorted(labels.items())), []).append(value)

    monkeypatch.setattr(metrics, "count", count)
    monkeypatch.setattr(metrics, "observe", observe)
    return found


def get(found, name, **labels):
    return found.get((name, *sorted(labels.items())))


def post(world, **body):
    async def send():
        async with world.connect() as client:
            return await client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 3, **body})

    return asyncio.run(send())


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_counted_with_its_tokens_and_times(make_world, recorded, stream):
    world = make_world()
    world.version.pause_s = 0.2  # before each of three chunks
    began_s = time.monotonic()
    assert post(world, stream=stream).status_code == 200
    took_s = time.monotonic() - began_s
    of = {"tenant": "anonymous", "model": "tiny", "version": "tiny-1"}
    counts, values = recorded["counts"], recorded["values"]
    assert get(counts, "swiftkv_gateway_requests_total", **of, status="200") == 1
    good = [target for target in ("ttft", "tpot", "both") if get(counts, GOOD, **of, target=target)]
    assert good == (["ttft", "tpot", "both"] if stream else ["both"])
    tokens = {kind: get(counts, "swiftkv_gateway_tokens_total", **of, kind=kind) for kind in ("prompt", "completion")}
    assert tokens == {"prompt": 7, "completion": 3}
    assert get(counts, "swiftkv_gateway_tokens_total", **of, kind="cached") == 2
    (whole_s,) = get(values, "swiftkv_gateway_request_seconds", **of)
    assert 0.6 <= whole_s <= took_s
    ttft, tpot = (get(values, f"swiftkv_gateway_{name}_seconds", **of) for name in ("ttft", "tpot"))
    if stream:
        assert 0.2 <= ttft[0] < whole_s and tpot == [pytest.approx((whole_s - ttft[0]) / 2)]
    else:
        assert (ttft, tpot) == (None, None)


def test_refusals_are_counted_by_their_code_and_are_not_good(make_world, recorded):
    world = make_world()
    assert post(world, model="absent").status_code == 404
    counts = recorded["counts"]
    assert get(counts, "swiftkv_gateway_refusals_total", tenant="anonymous", model="-", reason="model_not_found") == 1
    assert not any(name == GOOD for name, *_ in counts)
    assert recorded["values"] == {}


@pytest.mark.parametrize(
    ("ttft_s", "ended_s", "met"),
    [
        (1.0, 11.0, ["ttft", "tpot", "both"]),
        (2.1, 11.0, ["tpot"]),
        (1.0, 31.0, ["ttft"]),
        (None, 21.9, ["both"]),  # whole: all tokens just in time
        (None, 22.1, []),
        (1.0, None, ["ttft"]),  # cut
    ],
)
def test_which_targets_an_answer_met(ttft_s, ended_s, met):
    exchange = Exchange("id", "POST /v1/completions", targets=Targets(ttft_s=2, tpot_s=2))
    exchange.usage, exchange.ttft_s, exchange.ended_s = Usage(prompt=5, completion=11), ttft_s, ended_s
    assert exchange.list_met_targets() == met


def test_without_targets_every_whole_answer_is_good():
    exchange = Exchange("id", "POST /v1/completions", usage=Usage(prompt=5, completion=1), ended_s=1e6)
    assert exchange.list_met_targets() == ["both"]


def test_engines_are_told_whose_a_request_is_and_clients_cannot_say_otherwise(make_world):
    world = make_world()
    assert post(world, vllm_xargs={"swiftkv_tenant": "somebody else", "own": 1}).status_code in (200, 400)
    assert post(world).status_code == 200
    assert {call.request.vllm_xargs["swiftkv_tenant"] for call in world.version.calls} == {"anonymous"}
