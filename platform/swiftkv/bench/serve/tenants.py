"""Two tenants of equal weight before one engine: what one's flood does to the other's time to the first token.

A tenant's share is half of what the engine can do, which is measured first. The one sends all of its share, or 20 times
as much; the other half of its own.
Called by: bench/serve/run.py. Calls: bench/serve/servers.py, serving/gateway/keys.py, loadgen.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from swiftkv.bench.models import build_random_prompts
from swiftkv.bench.serve.servers import MODEL_ID
from swiftkv.errors import EngineError
from swiftkv.loadgen.answers import Request, find_percentile, take_completed
from swiftkv.loadgen.replay import draw_poisson_arrivals, run_closed, run_open
from swiftkv.serving.gateway.keys import create_key

FLOOD_FACTOR = 20
_PROMPT_TOKENS = 256
CAPACITY = {
    "max_in_flight_sequences": 16,
    "max_in_flight_prompt_tokens": _PROMPT_TOKENS,
    "max_queued_requests": 32,
}
"""One prompt: what the engine has in hand is what one tenant can be made to wait for. It costs the steps between one
prompt's end and the next one's coming; the share is of what is left."""
_VOCAB_SIZE = 8000
_NUM_AT_ONCE, _NUM_TO_TIME = 16, 96


@dataclass(frozen=True)
class Sharing:
    """What both tenants send, at random times: prompts much longer than answers."""

    duration_s: float = 90.0
    prompt_tokens: int = _PROMPT_TOKENS
    new_tokens: int = 16


def write_tenants(path: Path) -> dict[str, str]:
    """A tenants' file with two tenants; returns their keys by name."""
    keys, tenants = {}, []
    for name in ("steady", "flooding"):
        keys[name], digest = create_key()
        tenants.append({"name": name, "key_sha256": [digest]})
    path.write_text(yaml.safe_dump({"tenants": tenants}), encoding="utf-8")
    return keys


def measure_share(base_url: str, keys: dict[str, str], sharing: Sharing) -> float:
    """Half of the requests/s that are answered when 16 are sent at once. Raises: EngineError if one fails."""
    requests = _build("steady", keys, sharing, [0.0] * _NUM_TO_TIME, seed=1_000_000)
    run_closed(base_url, requests[:_NUM_AT_ONCE], _NUM_AT_ONCE)  # the first use of an engine is slower
    began_s = time.perf_counter()
    answers = run_closed(base_url, requests, _NUM_AT_ONCE)
    seconds = time.perf_counter() - began_s
    if len(take_completed(answers)) < len(answers):
        raise EngineError(f"requests failed: {next(a.reason for a in answers if a.outcome != 'complete')}")
    return len(answers) / seconds / 2


def measure_steady_ttft(
    base_url: str, keys: dict[str, str], sharing: Sharing, share_per_s: float, factor: float, seed: int
) -> float:
    """TTFT p95 in seconds of the steady tenant's answers while the other sends `factor` times its share.

    The steady tenant's requests are the same for every factor of one seed. Raises: EngineError if one of them fails.
    """
    rates = {"steady": share_per_s / 2, "flooding": share_per_s * factor}
    steady, flooding = (
        _build(tenant, keys, sharing, draw_poisson_arrivals(rate, sharing.duration_s, seed + place), seed + place)
        for place, (tenant, rate) in enumerate(rates.items())
    )
    completed = take_completed(run_open(base_url, [*steady, *flooding]), "steady")
    if len(completed) < len(steady):
        raise EngineError(f"{len(steady) - len(completed)} of the steady tenant's {len(steady)} requests failed.")
    return find_percentile([answer.ttft_s for answer in completed], 95)


def seeded(
    base_url: str, keys: dict[str, str], sharing: Sharing, share_per_s: float, factor: float
) -> Callable[[], float]:
    """One side of the comparison; every call has other requests, and the two sides' n-th calls the same steady ones."""
    seeds = iter(range(0, 1_000_000, 2))
    return lambda: measure_steady_ttft(base_url, keys, sharing, share_per_s, factor, next(seeds))


def _build(tenant: str, keys: dict[str, str], sharing: Sharing, arrivals: list[float], seed: int) -> list[Request]:
    prompts = build_random_prompts([sharing.prompt_tokens] * len(arrivals), _VOCAB_SIZE, seed)
    body = {"model": MODEL_ID, "max_tokens": sharing.new_tokens, "temperature": 0, "ignore_eos": True}
    return [
        Request({**body, "prompt": prompt}, time_s, tenant, key=keys[tenant])
        for prompt, time_s in zip(prompts, arrivals, strict=True)
    ]
