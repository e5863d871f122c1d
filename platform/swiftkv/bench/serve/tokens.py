"""Whether two pools answer what one engine answers: greedy tokens of many random prompts, token by token.

Called by: bench/serve/run.py. Calls: engine/llm.py, bench/serve/servers.py, loadgen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swiftkv.bench.models import Prompts, build_random_prompts
from swiftkv.bench.serve.servers import MODEL_ID, Platform, build_gateway, build_version
from swiftkv.engine.llm import generate_greedy, run_engine
from swiftkv.engine.settings import EngineSettings
from swiftkv.loadgen.answers import Request
from swiftkv.loadgen.replay import run_closed

NUM_PROMPTS = 200
NEW_TOKENS = 16
LONGEST_PROMPT = 1500
HOP_TOKENS = 16
SMALLEST_GAP = 0.02
"""In log probability: rounding to 16 bits can turn two tokens that are nearer to each other."""
_AT_ONCE = 8


@dataclass(frozen=True)
class Expected:
    """One engine's answer."""

    tokens: list[int]
    gaps: list[float]
    """By how much each token's log probability is above the second best's."""


def draw_prompts(vocab_size: int) -> Prompts:
    """Prompts of 1 to 1,500 random tokens, short ones as often as long ones."""
    lengths = np.exp(np.random.default_rng(1).uniform(0, math.log(LONGEST_PROMPT), NUM_PROMPTS))
    return build_random_prompts([max(1, int(length)) for length in lengths], vocab_size)


def ask_one_engine(model: Path, settings: EngineSettings, prompts: Prompts) -> list[Expected]:
    """What a whole engine in this process answers."""
    with run_engine(model, settings) as llm:
        outputs = generate_greedy(llm, prompts, NEW_TOKENS, logprobs=2)
    return [Expected(list(output.outputs[0].token_ids), _list_gaps(output.outputs[0].logprobs)) for output in outputs]


def ask_two_pools(platform: Platform, model: Path, settings: EngineSettings, prompts: Prompts) -> list[list[int]]:
    """What a prefill half and a decode replica answer together, through the gateway."""
    engine = settings.model_dump(exclude_defaults=True)
    pool = {"engine": engine, "num_cpus": 0.5}
    pair = {"model": str(model), "prefill": pool, "decode": pool, "hop": {"min_tokens": HOP_TOKENS, "timeout_s": 120}}
    base_url = platform.deploy([build_version("pair", pair), build_gateway(["version"], {})])
    body = {"model": MODEL_ID, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answers = run_closed(base_url, [Request({**body, "prompt": prompt}) for prompt in prompts], _AT_ONCE)
    failed = [answer.reason for answer in answers if answer.outcome != "complete"]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(answers)} requests failed: {failed[0]}")
    return [answer.token_ids for answer in answers]


def count_differences(answers: Sequence[list[int]], expected: Sequence[Expected], smallest_gap: float) -> int:
    """Answers whose first token that differs was chosen by more than `smallest_gap`."""
    count = 0
    for answer, one in zip(answers, expected, strict=True):
        places = [i for i, pair in enumerate(zip(answer, one.tokens, strict=True)) if pair[0] != pair[1]]
        count += bool(places) and one.gaps[places[0]] > smallest_gap
    return count


def _list_gaps(logprobs: Sequence[Any]) -> list[float]:
    gaps = []
    for position in logprobs:
        best, second, *_ = sorted((entry.logprob for entry in position.values()), reverse=True)
        gaps.append(best - second)
    return gaps
