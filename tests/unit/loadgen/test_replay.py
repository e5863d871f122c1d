"""The load generator against a real HTTP server whose answers end in every way an answer can."""

import asyncio
import itertools
import json

import pytest
from aiohttp import web

from swiftkv.loadgen.answers import Request, find_percentile, take_completed
from swiftkv.loadgen.client import Client
from swiftkv.loadgen.replay import draw_poisson_arrivals, replay_closed, replay_open

GAP_S = 0.05


class Server:
    """Answers as `body["way"]` says, and counts how many requests it has at once."""

    def __init__(self):
        self.running = self.most = 0

    async def answer(self, http_request):
        way = (await http_request.json())["way"]
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if way == "refused":
                return web.json_response({"error": {"message": "no"}}, status=429)
            response = web.StreamResponse()
            await response.prepare(http_request)
            for token in (5, 6, 7):
                await self.send(response, {"choices": [{"text": "x", "token_ids": [token], "finish_reason": None}]})
                await asyncio.sleep(GAP_S)
            if way == "error event":
                await self.send(response, {"error": {"message": "engine lost"}})
            elif way == "cut":
                http_request.transport.abort()
            elif way == "short":
                await response.write(b"data: [DONE]\n\n")
            elif way == "hanging":
                await asyncio.sleep(5)
            elif way == "complete":
                await self.send(response, {"choices": [{"text": "", "finish_reason": "length"}]})
                await self.send(response, {"choices": [], "usage": {"completion_tokens": 3}})
                await response.write(b"data: [DONE]\n\n")
            return response
        finally:
            self.running -= 1

    async def send(self, response, event):
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


async def serve_and(send):
    server = Server()
    app = web.Application()
    app.router.add_post("/v1/completions", server.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    try:
        async with Client(f"http://127.0.0.1:{port}/v1", timeout_s=1) as client:
            return server, await send(client)
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("way", "outcome", "reason"),
    [
        ("complete", "complete", "length"),
        ("refused", "told", "429"),
        ("error event", "told", "engine lost"),
        ("cut", "broken", ""),
        ("short", "silent", ""),
        ("hanging", "silent", "1 s"),
    ],
)
def test_every_end_of_an_answer_is_told_from_the_others(way, outcome, reason):
    _, answer = asyncio.run(serve_and(lambda client: client.send(Request({"way": way}))))
    assert answer.outcome == outcome
    assert reason in answer.reason


def test_times_are_of_the_chunks():
    _, answer = asyncio.run(serve_and(lambda client: client.send(Request({"way": "complete"}))))
    assert answer.token_ids == [5, 6, 7]
    assert 0 < answer.ttft_s < GAP_S
    assert answer.tpot_s == pytest.approx(3 * GAP_S / 2, rel=0.5)  # the closing event comes one gap later


def test_an_open_loop_sends_whatever_is_still_running():
    requests = [Request({"way": "complete"}, arrival_s=index * GAP_S / 5) for index in range(10)]
    server, answers = asyncio.run(serve_and(lambda client: replay_open(client, requests)))
    assert len(take_completed(answers)) == 10
    assert server.most > 5
    assert [answer.request for answer in answers] == requests


def test_a_closed_loop_keeps_to_its_number():
    requests = [Request({"way": "complete"})] * 7
    server, answers = asyncio.run(serve_and(lambda client: replay_closed(client, requests, 3)))
    assert len(take_completed(answers)) == 7
    assert server.most == 3


def test_poisson_arrivals_have_the_rate_and_the_spread_of_the_process():
    times = draw_poisson_arrivals(rate_per_s=20, duration_s=500, seed=3)
    gaps = [later - sooner for sooner, later in itertools.pairwise(times)]
    assert len(times) == pytest.approx(10_000, rel=0.03)
    assert times[-1] < 500
    mean = sum(gaps) / len(gaps)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.1)


def test_percentiles_leave_out_what_was_not_measured():
    assert find_percentile([1.0, float("nan"), 3.0], 50) == 2.0
    with pytest.raises(ValueError, match="nothing"):
        find_percentile([float("nan")], 99)
