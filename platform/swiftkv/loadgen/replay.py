"""Sends a load: each request at its time whatever the others do (open loop), or so many at once (closed loop).

Called by: bench, tests. Calls: loadgen/client.py.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from swiftkv.loadgen.answers import Answer, Request
from swiftkv.loadgen.client import Client

OnAnswer = Callable[[Answer], None]


async def replay_open(
    client: Client, requests: Sequence[Request], on_answer: OnAnswer = lambda _: None
) -> list[Answer]:
    """All answers in the order of the requests, each sent `arrival_s` after the client's start."""

    async def send(request: Request) -> Answer:
        await asyncio.sleep(request.arrival_s - client.now_s())
        answer = await client.send(request)
        on_answer(answer)
        return answer

    return list(await asyncio.gather(*(send(request) for request in requests)))


async def replay_closed(client: Client, requests: Sequence[Request], concurrency: int) -> list[Answer]:
    """All answers in the order of the requests; the next one is sent when one of `concurrency` has ended."""
    places = asyncio.Semaphore(concurrency)

    async def send(request: Request) -> Answer:
        async with places:
            return await client.send(request)

    return list(await asyncio.gather(*(send(request) for request in requests)))


def run_open(base_url: str, requests: Sequence[Request], **options: Any) -> list[Answer]:
    """`replay_open` with a client of its own."""

    async def run() -> list[Answer]:
        async with Client(base_url, **options) as client:
            return await replay_open(client, requests)

    return asyncio.run(run())


def run_closed(base_url: str, requests: Sequence[Request], concurrency: int, **options: Any) -> list[Answer]:
    """`replay_closed` with a client of its own."""

    async def run() -> list[Answer]:
        async with Client(base_url, **options) as client:
            return await replay_closed(client, requests, concurrency)

    return asyncio.run(run())


def draw_poisson_arrivals(rate_per_s: float, duration_s: float, seed: int) -> list[float]:
    """Times of arrival in [0, `duration_s`), of so many a second on average."""
    generator = np.random.default_rng(seed)
    gaps = generator.exponential(1 / rate_per_s, int(rate_per_s * duration_s * 2) + 50)
    times = np.cumsum(gaps)
    return [float(time) for time in times[times < duration_s]]
