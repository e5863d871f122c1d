"""How long the policy takes to decide for a large fleet, with everything that it remembers.

Called by: bench/serve, tests. Calls: serving/policy.
"""

import time
from statistics import median

from swiftkv.serving.policy.costs import Costs
from swiftkv.serving.policy.decision import decide
from swiftkv.serving.policy.lengths import Lengths
from swiftkv.serving.policy.memory import Memory
from swiftkv.serving.policy.observation import Arrivals, Observation, PoolState, Replica
from swiftkv.serving.policy.settings import PolicySettings, PoolLimits, Targets
from swiftkv.serving.policy.stats import WINDOW_S

_COSTS = Costs(
    prefill_s_per_token=1 / 5000,
    step_s=0.02,
    step_s_per_sequence=0.001,
    step_s_per_context_token=5e-7,
    kv_tokens=100_000,
)
_PROMPTS = [100 * 2**power for power in range(7)]


def time_decision(num_replicas: int, repeats: int = 20) -> float:
    """Seconds of the median decision for a fleet of so many replicas, half of them in each pool, that keeps to a
    budget and remembers as many windows as it ever does."""
    half = num_replicas // 2
    limits = PoolLimits(max_replicas=num_replicas)
    settings = PolicySettings(
        targets=Targets(ttft_s=2, tpot_s=0.05),
        costs=_COSTS,
        prefill=limits,
        decode=limits,
        device_budget=num_replicas,
    )
    memory = Memory()
    for tick in range(settings.history):
        memory = decide(_observe(half, 300 + tick, tick * WINDOW_S), settings, memory).memory
    observation = _observe(half, 300, settings.history * WINDOW_S)
    took: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        decide(observation, settings, memory)
        took.append(time.perf_counter() - started)
    return median(took)


def _observe(replicas: int, requests_per_s: float, now_s: float) -> Observation:
    """Prompts from 100 to 6,400 tokens, answers of 100."""
    count = round(requests_per_s * WINDOW_S)
    lengths = Lengths.of_requests((_PROMPTS[index % len(_PROMPTS)], 100) for index in range(count))
    return Observation(
        now_s,
        PoolState(replicas, tuple(Replica(f"p{index}", computing_s=20) for index in range(replicas))),
        PoolState(replicas, tuple(Replica(f"d{index}", kv_usage_frac=0.5) for index in range(replicas))),
        Arrivals(WINDOW_S, lengths),
    )
