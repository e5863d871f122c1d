"""A decode pool that the policy grows from one replica to two and back: real engines, a load that rises and falls.

Called by: bench/serve/run.py. Calls: bench/serve/servers.py, loadgen.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from swiftkv.bench.models import build_random_prompts
from swiftkv.bench.pairs import OnStage
from swiftkv.bench.serve.servers import MODEL_ID, Platform, build_gateway, build_version
from swiftkv.engine.settings import EngineSettings
from swiftkv.errors import EngineError
from swiftkv.loadgen.answers import Answer, Request
from swiftkv.loadgen.client import Client

FEW, MANY = 2, 14
"""Streams at once: the more are more sequences than one replica takes."""
SETTLED_S = 15.0
"""For which the load goes on after the pool has reached a size."""
TIMEOUT_S = 240.0
_PROMPT_TOKENS, _NEW_TOKENS = 64, 96
_HOP_TOKENS = 32
_VOCAB_SIZE = 512


@dataclass(frozen=True)
class Grown:
    """What became of the load, and the pool's sizes as they were seen."""

    answers: list[Answer]
    sizes: list[int]

    @property
    def num_lost(self) -> int:
        """Requests without a complete answer."""
        return sum(answer.outcome != "complete" for answer in self.answers)


def grow_and_shrink(platform: Platform, model: Path, settings: EngineSettings, on_stage: OnStage) -> Grown:
    """Few streams, then many until there are two decode replicas, then few until there is one.

    Raises: EngineError if the pool does not get there in time.
    """
    base_url = _deploy(platform, model, settings)
    sizes: list[int] = []

    def count() -> int:
        size = platform.count_replicas("version", "Decode:")
        if sizes[-1:] != [size]:
            on_stage(f"{size} decode replica{'s' * (size != 1)}")
            sizes.append(size)
        return size

    return Grown(asyncio.run(_send(base_url, count)), sizes)


def _deploy(platform: Platform, model: Path, settings: EngineSettings) -> str:
    pool = {"num_cpus": 0.3, "engine": settings.model_dump(exclude_defaults=True)}
    pair = {
        "model_id": MODEL_ID,
        "model": str(model),
        "prefill": pool,
        "decode": pool | {"min_replicas": 1, "max_replicas": 2},
        "hop": {"min_tokens": _HOP_TOKENS, "timeout_s": 60},
    }
    limits = {
        "targets": {"ttft_s": 5.0, "tpot_s": 1.0},
        "device_budget": 3,
        "scale_down_delay_s": 10,
        "prefill": {"startup_s": 30},
        "decode": {"startup_s": 30},
    }
    policy = {
        "policy_function": "swiftkv.serving.autoscaling:PoolPolicy",
        "policy_kwargs": {"pair": pair, "settings": limits},
    }
    version = build_version("pair", pair) | {"autoscaling_policy": policy}
    return platform.deploy([version, build_gateway(["version"], {"max_in_flight_sequences": 64})])


async def _send(base_url: str, count: Callable[[], int]) -> list[Answer]:
    async with Client(base_url) as client:
        answers = await _hold(client, FEW, lambda: count() == 1)
        answers += await _hold(client, MANY, lambda: count() == 2)
        answers += await _hold(client, FEW, lambda: count() == 1)
    return answers


async def _hold(client: Client, at_once: int, is_reached: Callable[[], bool]) -> list[Answer]:
    """So many streams until the condition holds, and for a while after; all of them end."""
    is_over = asyncio.Event()
    streams = [asyncio.create_task(_stream(client, seed, is_over)) for seed in range(at_once)]
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while not await asyncio.to_thread(is_reached):
                await asyncio.sleep(0.5)
        await asyncio.sleep(SETTLED_S)
    except TimeoutError:
        raise EngineError(f"the decode pool had not the size for {at_once} streams after {TIMEOUT_S:.0f} s") from None
    finally:
        is_over.set()
        answers = await asyncio.gather(*streams)
    return [answer for stream in answers for answer in stream]


async def _stream(client: Client, seed: int, is_over: asyncio.Event) -> list[Answer]:
    answers = []
    body = {"model": MODEL_ID, "max_tokens": _NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    while not is_over.is_set():
        seed += MANY
        (prompt,) = build_random_prompts([_PROMPT_TOKENS], _VOCAB_SIZE, seed)
        answers.append(await client.send(Request({**body, "prompt": prompt}, arrival_s=client.now_s())))
    return answers
