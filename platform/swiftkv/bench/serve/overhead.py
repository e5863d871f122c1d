"""What gateway and Ray Serve cost: the same engine behind vLLM's own server and behind the platform, in turns.

Called by: bench/serve/run.py. Calls: bench/serve/servers.py, loadgen.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from swiftkv.bench.models import build_random_prompts
from swiftkv.bench.serve.servers import MODEL_ID
from swiftkv.errors import EngineError
from swiftkv.loadgen.answers import Answer, Request, take_completed
from swiftkv.loadgen.replay import run_closed

_VOCAB_SIZE = 512
"""Of prompts: within that of every model of the bench."""


@dataclass(frozen=True)
class Load:
    """Streams of random prompts."""

    num_requests: int
    at_once: int
    prompt_tokens: int
    new_tokens: int


MANY = Load(num_requests=32, at_once=16, prompt_tokens=200, new_tokens=64)
ONE = Load(num_requests=40, at_once=1, prompt_tokens=16, new_tokens=2)


def measure_throughput(base_url: str, seed: int) -> float:
    """Prompt and completion tokens/s of 16 streams."""
    started = time.perf_counter()
    answers = run_load(base_url, MANY, seed)
    took_s = time.perf_counter() - started
    return sum(MANY.prompt_tokens + answer.completion_tokens for answer in answers) / took_s


def measure_ttft(base_url: str, seed: int) -> float:
    """Median TTFT of one stream at a time, in ms."""
    return 1e3 * statistics.median(answer.ttft_s for answer in run_load(base_url, ONE, seed))


def run_load(base_url: str, load: Load, seed: int) -> list[Answer]:
    """The answers. Raises: EngineError if one is not complete."""
    prompts = build_random_prompts([load.prompt_tokens] * load.num_requests, _VOCAB_SIZE, seed)
    body = {"model": MODEL_ID, "max_tokens": load.new_tokens, "temperature": 0, "ignore_eos": True}
    answers = run_closed(base_url, [Request({**body, "prompt": prompt}) for prompt in prompts], load.at_once)
    if len(take_completed(answers)) < len(answers):
        reasons = {answer.reason for answer in answers if answer.outcome != "complete"}
        raise EngineError(f"requests of the bench's load failed: {', '.join(sorted(reasons)[:3])}")
    return answers


def seeded(measure: Callable[[str, int], float], base_url: str) -> Callable[[], float]:
    """The measure of one server with other prompts every time, so that nothing is cached."""
    seeds = iter(range(1_000_000))
    return lambda: measure(base_url, next(seeds))
