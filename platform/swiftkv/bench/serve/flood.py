"""Short chats while long prompts pour in: a prefill and a decode pool of one core each against one engine on both.

The one engine is vLLM's own server as it is best for the chats. Every chunk size (tokens of a long prompt in one step)
is tried, with chats that wait until a long prompt is done, as vLLM does by default, and with room in the step for chats
(`long_prefill_token_threshold`). Where they wait, few decode while long prompts are prefilled and their TPOT says
little: the best is chosen among those that begin a chat's answer in time. The one engine has no gateway before it,
which is to its advantage.
Called by: bench/serve/run.py. Calls: bench/serve/servers.py, loadgen.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from swiftkv.bench.models import build_random_prompts
from swiftkv.bench.pairs import OnStage
from swiftkv.bench.serve.servers import MODEL_ID, Platform, build_gateway, build_version, run_bare_server
from swiftkv.engine.settings import EngineSettings
from swiftkv.errors import EngineError
from swiftkv.loadgen.answers import Answer, Request, find_percentile, take_completed
from swiftkv.loadgen.replay import draw_poisson_arrivals, run_open

CHUNK_SIZES = (64, 128, 256, 512, 1024, 2048)
CHAT_ROOM_TOKENS = 256
"""Of a step, beside the chunk of a long prompt."""
CHAT_TTFT_S = 1.0
"""At the 95th percentile: an engine with a longer one does not serve chats."""
HOP_TOKENS = 256
PREFILL_CHUNK, DECODE_CHUNK = 2048, 64
_VOCAB_SIZE = 4000
_CHAT, _LONG = "chat", "long"


@dataclass(frozen=True)
class Flood:
    """Chats that arrive at random, and long prompts, one every so many seconds: about what one core can prefill."""

    duration_s: float = 60
    chats_per_s: float = 2.0
    chat_prompt_tokens: int = 48
    chat_new_tokens: int = 32
    long_every_s: float = 15
    long_prompt_tokens: int = 8000
    long_new_tokens: int = 2

    def build_requests(self, seed: int) -> list[Request]:
        """The same for every server that is given the same seed."""
        chats = draw_poisson_arrivals(self.chats_per_s, self.duration_s, seed)
        longs = [float(time_s) for time_s in np.arange(1, self.duration_s, self.long_every_s)]
        return [
            *_build(chats, _CHAT, self.chat_prompt_tokens, self.chat_new_tokens, seed + 2),
            *_build(longs, _LONG, self.long_prompt_tokens, self.long_new_tokens, seed + 3),
        ]


@dataclass(frozen=True)
class Outcome:
    """What one server made of a flood, in seconds."""

    chat_tpot_p99_s: float
    chat_tpot_p50_s: float
    chat_ttft_p95_s: float
    long_ttft_p50_s: float
    long_ttft_p95_s: float


def _build(arrivals: list[float], label: str, prompt_tokens: int, new_tokens: int, seed: int) -> list[Request]:
    prompts = build_random_prompts([prompt_tokens] * len(arrivals), _VOCAB_SIZE, seed)
    body = {"model": MODEL_ID, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    return [Request({**body, "prompt": p}, time_s, label) for p, time_s in zip(prompts, arrivals, strict=True)]


def send_flood(base_url: str, flood: Flood, seed: int) -> Outcome:
    """The outcome once all are answered. Raises: EngineError if one is not complete."""
    answers = run_open(base_url, flood.build_requests(seed))
    if len(take_completed(answers)) < len(answers):
        raise EngineError(f"requests of the flood failed: {next(a.reason for a in answers if a.outcome != 'complete')}")
    return _summarise(take_completed(answers, _CHAT), take_completed(answers, _LONG))


def warm_up(base_url: str, flood: Flood) -> None:
    """A short flood: the first use of an engine is slower."""
    send_flood(base_url, replace(flood, duration_s=5), seed=1_000_000)


def _summarise(chats: list[Answer], longs: list[Answer]) -> Outcome:
    tpots = [answer.tpot_s for answer in chats]
    long_ttfts = [answer.ttft_s for answer in longs]
    return Outcome(
        chat_tpot_p99_s=find_percentile(tpots, 99),
        chat_tpot_p50_s=find_percentile(tpots, 50),
        chat_ttft_p95_s=find_percentile([answer.ttft_s for answer in chats], 95),
        long_ttft_p50_s=find_percentile(long_ttfts, 50),
        long_ttft_p95_s=find_percentile(long_ttfts, 95),
    )


def seeded(base_url: str, flood: Flood) -> Callable[[], Outcome]:
    """The floods of one server, each with other requests."""
    seeds = iter(range(1_000_000))
    return lambda: send_flood(base_url, flood, next(seeds))


@dataclass(frozen=True)
class Chunking:
    """How one engine cuts long prompts."""

    tokens: int
    has_room_for_chats: bool

    def apply(self, settings: EngineSettings) -> EngineSettings:
        """The same engine with it."""
        room = CHAT_ROOM_TOKENS if self.has_room_for_chats else 0
        update = {"max_num_batched_tokens": self.tokens + room, "long_prefill_token_threshold": room and self.tokens}
        return settings.model_copy(update=update)

    def __str__(self) -> str:
        return f"{self.tokens} tokens a step" + ", room for chats" * self.has_room_for_chats


def try_chunkings(model: Path, settings: EngineSettings, flood: Flood, on_stage: OnStage) -> dict[Chunking, Outcome]:
    """What one engine on both cores makes of one flood, for each way to cut long prompts."""
    outcomes = {}
    for chunking in (Chunking(tokens, has_room) for has_room in (False, True) for tokens in CHUNK_SIZES):
        on_stage(f"one engine, {chunking}")
        with run_bare_server(model, chunking.apply(settings), in_one_process=True) as base_url:
            warm_up(base_url, flood)
            outcomes[chunking] = send_flood(base_url, flood, seed=0)
    return outcomes


def choose_best(outcomes: dict[Chunking, Outcome]) -> Chunking:
    """The lowest TPOT p99 among those that begin chats in time; among all if none does."""
    in_time = [chunking for chunking, outcome in outcomes.items() if outcome.chat_ttft_p95_s <= CHAT_TTFT_S]
    return min(in_time or outcomes, key=lambda chunking: outcomes[chunking].chat_tpot_p99_s)


def deploy_pair(platform: Platform, model: Path, settings: EngineSettings) -> str:
    """Two pools, one core each, long prompts going to the prefill pool."""
    prefill, decode = (
        {"engine": settings.model_copy(update=update).model_dump(exclude_defaults=True), "num_cpus": 0.5}
        for update in (
            {"cpu_cores": "0", "max_num_batched_tokens": PREFILL_CHUNK},
            {"cpu_cores": "1", "max_num_batched_tokens": DECODE_CHUNK},
        )
    )
    # Patient: a long prompt may wait for another one in the prefill pool longer than a user's would.
    hop = {"min_tokens": HOP_TOKENS, "timeout_s": 120, "transfer_timeout_s": 120}
    pair = {"model": str(model), "prefill": prefill, "decode": decode, "hop": hop}
    capacity = {"max_in_flight_sequences": 64, "max_in_flight_prompt_tokens": 1 << 20}
    return platform.deploy([build_version("pair", pair), build_gateway(["version"], capacity)])
