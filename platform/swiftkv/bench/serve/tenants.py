"""Two tenants of equal weight before one engine: what one's flood does to the other's time to the first token.

Called by: bench/serve/run.py. Calls: bench/serve/servers.py, serving/gateway/keys.py, loadgen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from swiftkv.bench.models import build_random_prompts
from swiftkv.bench.serve.servers import MODEL_ID
from swiftkv.loadgen.answers import Request, find_percentile, take_completed
from swiftkv.loadgen.replay import draw_poisson_arrivals, run_open
from swiftkv.serving.gateway.keys import create_key

FLOOD_FACTOR = 20
CAPACITY = {"max_in_flight_sequences": 16, "max_in_flight_prompt_tokens": 256}
_VOCAB_SIZE = 8000


@dataclass(frozen=True)
class Sharing:
    """What each tenant sends while it keeps to its share: chats at random times."""

    duration_s: float = 60.0
    requests_per_s: float = 0.5
    prompt_tokens: int = 64
    new_tokens: int = 8


def write_tenants(path: Path) -> dict[str, str]:
    """A tenants' file with two tenants; returns their keys by name."""
    keys, tenants = {}, []
    for name in ("steady", "flooding"):
        keys[name], digest = create_key()
        tenants.append({"name": name, "key_sha256": [digest]})
    path.write_text(yaml.safe_dump({"tenants": tenants}), encoding="utf-8")
    return keys


def measure_steady_ttft(base_url: str, keys: dict[str, str], sharing: Sharing, factor: float, seed: int) -> float:
    """TTFT p95 in seconds of the steady tenant's answers while the other sends `factor` times its share.

    The steady tenant's requests are the same for every factor of one seed.
    """
    steady = _build("steady", keys, sharing, 1, seed)
    flooding = _build("flooding", keys, sharing, factor, seed + 1)
    answers = run_open(base_url, [*steady, *flooding])
    return find_percentile([answer.ttft_s for answer in take_completed(answers, "steady")], 95)


def seeded(base_url: str, keys: dict[str, str], sharing: Sharing, factor: float) -> Callable[[], float]:
    """One side of the comparison; every call has other requests, and the two sides' n-th calls the same steady ones."""
    seeds = iter(range(0, 1_000_000, 2))
    return lambda: measure_steady_ttft(base_url, keys, sharing, factor, next(seeds))


def _build(tenant: str, keys: dict[str, str], sharing: Sharing, factor: float, seed: int) -> list[Request]:
    arrivals = draw_poisson_arrivals(sharing.requests_per_s * factor, sharing.duration_s, seed)
    prompts = build_random_prompts([sharing.prompt_tokens] * len(arrivals), _VOCAB_SIZE, seed)
    body = {"model": MODEL_ID, "max_tokens": sharing.new_tokens, "temperature": 0, "ignore_eos": True}
    return [
        Request({**body, "prompt": prompt}, time_s, tenant, key=keys[tenant])
        for prompt, time_s in zip(prompts, arrivals, strict=True)
    ]
