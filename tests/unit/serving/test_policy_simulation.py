"""The policy in a closed loop with a simulated fleet, on ten shapes of load and a simulated clock."""

import pytest

from swiftkv.capacity.load_shapes import build_shapes
from swiftkv.capacity.sizing import count_reversals, find_best, run_policy
from swiftkv.serving.policy.costs import Costs
from swiftkv.serving.policy.settings import POOLS, PolicySettings, PoolLimits, Targets

COSTS = Costs(
    prefill_s_per_token=1 / 5000,
    prefill_s_per_token_squared=5e-9,
    first_token_s=0.02,
    step_s=0.02,
    step_s_per_sequence=0.001,
    step_s_per_context_token=5e-7,
    kv_tokens=80_000,
)
LIMITS = PoolLimits(min_replicas=1, max_replicas=12, startup_s=60)
SETTINGS = PolicySettings(targets=Targets(ttft_s=2.5, tpot_s=0.05), costs=COSTS, prefill=LIMITS, decode=LIMITS)
SHAPES = build_shapes()


@pytest.mark.parametrize("name", SHAPES)
def test_the_final_size_is_within_one_of_the_best_and_does_not_oscillate(name: str) -> None:
    shape = SHAPES[name]
    decisions = run_policy(shape, SETTINGS, until_s=2400, seed=1)
    best = find_best(shape, COSTS, SETTINGS.targets, LIMITS.max_replicas)
    final = decisions[-1]
    for pool in POOLS:
        assert abs(final.pool(pool).replicas - best[pool]) <= 1, (final.pool(pool), best, final.inputs)
        sizes = [decision.pool(pool).replicas for decision in decisions[-60:]]
        assert count_reversals(sizes) == 0, (pool, sizes)


def test_a_turn_is_from_growing_to_shrinking_or_back() -> None:
    assert count_reversals([4, 4, 3, 3, 2]) == 0
    assert count_reversals([4, 5, 5, 6]) == 0
    assert count_reversals([4, 5, 5, 4, 4, 5]) == 2
