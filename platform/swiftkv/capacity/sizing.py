"""The policy in a closed loop with the simulated fleet, the best size by trying sizes, and what counts as oscillating.

Called by: bench/serve/shapes.py, tests. Calls: capacity/fleet.py, serving/policy/decision.py.
"""

import itertools
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence

from swiftkv.capacity.fleet import DecodeEngine, Fleet, PrefillEngine, Request
from swiftkv.capacity.load_shapes import Shape
from swiftkv.serving.policy.costs import Costs
from swiftkv.serving.policy.decision import Decision, decide
from swiftkv.serving.policy.lengths import Bucket, Lengths, find_bucket
from swiftkv.serving.policy.memory import Memory
from swiftkv.serving.policy.observation import Arrivals, Observation, PoolState, Replica
from swiftkv.serving.policy.settings import POOLS, PolicySettings, Pool, Targets
from swiftkv.serving.policy.stats import WINDOW_S

OBSERVED_S = 1200.0
"""How much of a shape's end the best size is found for."""
_WARM_UP_S, _COOL_DOWN_S = 60.0, 1200.0


def run_policy(shape: Shape, settings: PolicySettings, until_s: float, seed: int, tick_s: float = 10) -> list[Decision]:
    """The policy's decisions, one every `tick_s`, each carried out."""
    fleet = Fleet(settings.costs, shape.start, shape.start)
    decisions: list[Decision] = []

    def control(fleet: Fleet, now_s: float) -> None:
        memory = decisions[-1].memory if decisions else Memory()
        decision = decide(observe(fleet, now_s), settings, memory)
        decisions.append(decision)
        for pool in POOLS:
            if decision.pool(pool).replicas != fleet.target[pool]:
                fleet.scale(now_s, pool, decision.pool(pool).replicas, settings.limits(pool).startup_s)

    fleet.run(shape.draw(0, until_s, seed), until_s, control, tick_s)
    return decisions


def count_reversals(sizes: Sequence[int]) -> int:
    """How often a pool turned from growing to shrinking or back. Oscillation is any of it."""
    changes = [after - before for before, after in itertools.pairwise(sizes) if after != before]
    return sum((before > 0) != (after > 0) for before, after in itertools.pairwise(changes))


def find_best(shape: Shape, costs: Costs, targets: Targets, max_replicas: int, seed: int = 7) -> dict[Pool, int]:
    """The fewest replicas of each pool that keep its target at the shape's last level, the other pool being large."""
    many = max_replicas + 4
    sizes = range(1, many + 1)

    def find(keeps: Callable[[int], bool]) -> int:
        return sizes[min(bisect_left(sizes, True, key=keeps), many - 1)]

    return {
        "prefill": find(lambda n: keeps_targets(shape, costs, targets, (n, many), seed)["prefill"]),
        "decode": find(lambda n: keeps_targets(shape, costs, targets, (many, n), seed)["decode"]),
    }


def keeps_targets(
    shape: Shape, costs: Costs, targets: Targets, replicas: tuple[int, int], seed: int
) -> dict[Pool, bool]:
    """Whether so many (prefill, decode) replicas keep the TTFT and the TPOT target at the shape's last level."""
    from_s = shape.settled_s
    until_s = from_s + OBSERVED_S
    fleet = Fleet(costs, *replicas, from_s=from_s)
    requests = fleet.run(shape.draw(from_s, until_s, seed), until_s + _COOL_DOWN_S)
    judged = [request for request in requests if request.arrival.time_s > from_s + _WARM_UP_S]
    rank = int(targets.percentile * len(judged))
    return {
        "prefill": sorted(request.ttft_s for request in judged)[rank] <= targets.ttft_s,
        "decode": sorted(request.tpot_s for request in judged)[rank] <= targets.tpot_s,
    }


def observe(fleet: Fleet, now_s: float) -> Observation:
    """What the replicas of the fleet would report."""
    while fleet.arrived and fleet.arrived[0].arrival.time_s < now_s - WINDOW_S:
        fleet.arrived.popleft()
    while fleet.finished and fleet.finished[0].finished_s < now_s - WINDOW_S:
        fleet.finished.popleft()
    prefill = [_report_prefill(i, engine, now_s) for i, engine in enumerate(fleet.prefill) if _exists(engine)]
    decode = [_report_decode(i, engine, now_s) for i, engine in enumerate(fleet.decode) if _exists(engine)]
    return Observation(
        now_s=now_s,
        prefill=PoolState(fleet.target["prefill"], tuple(prefill), 0),
        decode=PoolState(fleet.target["decode"], tuple(decode), len(fleet.unserved)),
        arrivals=Arrivals(min(WINDOW_S, now_s), _count(fleet.arrived, fleet.finished)),
    )


def _exists(engine: PrefillEngine | DecodeEngine) -> bool:
    return not engine.is_draining or engine.load > 0


def _find_state(engine: PrefillEngine | DecodeEngine, now_s: float) -> str:
    return "draining" if engine.is_draining else "running" if engine.ready_s <= now_s else "starting"


def _report_prefill(index: int, engine: PrefillEngine, now_s: float) -> Replica:
    while engine.work and engine.work[0][1] < now_s - WINDOW_S:
        engine.work.popleft()
    seconds = [min(end, now_s) - max(start, now_s - WINDOW_S) for start, end, _ in engine.work]
    tokens = [size * part / (end - start) for part, (start, end, size) in zip(seconds, engine.work, strict=True)]
    return Replica(
        name=f"p{index}",
        state=_find_state(engine, now_s),  # type: ignore[arg-type]
        window_s=WINDOW_S,
        queued_prompt_tokens=engine.queued_tokens,
        running_requests=engine.load,
        computed_prompt_tokens=sum(tokens),
        computing_s=sum(seconds),
    )


def _report_decode(index: int, engine: DecodeEngine, now_s: float) -> Replica:
    return Replica(
        name=f"d{index}",
        state=_find_state(engine, now_s),  # type: ignore[arg-type]
        window_s=WINDOW_S,
        running_requests=engine.load,
        kv_usage_frac=engine.kv / engine.costs.kv_tokens,
    )


def _count(arrived: deque[Request], finished: deque[Request]) -> Lengths:
    sums: dict[int, list[float]] = {}
    for request in arrived:
        prompt = request.arrival.prompt_tokens
        bucket = sums.setdefault(find_bucket(prompt), [0.0] * 6)
        for index, amount in enumerate((1, prompt, prompt)):
            bucket[index] += amount
    for request in finished:
        completion = request.arrival.completion_tokens
        bucket = sums.setdefault(find_bucket(request.arrival.prompt_tokens), [0.0] * 6)
        for index, amount in enumerate((1, completion, completion**2)):
            bucket[3 + index] += amount
    return Lengths({index: Bucket(*values) for index, values in sums.items()})
