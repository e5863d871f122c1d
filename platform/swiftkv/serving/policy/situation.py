"""What an observation and the memory say together: demand, costs as measured, and the loads that follow.

Called by: serving/policy/decision.py. Calls: demand, calibration, prefill, decode.
"""

from dataclasses import dataclass

from swiftkv.serving.policy.calibration import measure_decode_scale, measure_prefill_scale, smooth_scale
from swiftkv.serving.policy.costs import Costs
from swiftkv.serving.policy.decode import DecodeLoad, build_decode_load
from swiftkv.serving.policy.demand import Demand, estimate_demand, remember_arrivals
from swiftkv.serving.policy.memory import Memory, Window
from swiftkv.serving.policy.observation import Observation, PoolState, Replica
from swiftkv.serving.policy.prefill import PrefillLoad, build_prefill_load
from swiftkv.serving.policy.settings import POOLS, PolicySettings, Pool


@dataclass(frozen=True)
class Situation:
    """Everything that sizes follow from."""

    observation: Observation
    settings: PolicySettings
    fresh: dict[Pool, list[Replica]]
    """Running replicas whose reports are young enough."""
    num_stale: dict[Pool, int]
    """Running replicas whose reports are not."""
    windows: list[Window]
    demand: Demand
    prefill_scale: float | None
    decode_scale: float | None
    costs: Costs
    """As measured, where something was measured."""
    prefill_load: PrefillLoad
    decode_load: DecodeLoad
    traffic_s: dict[Pool, float]
    """When each pool was last needed."""

    @property
    def now_s(self) -> float:
        """Time of the observation."""
        return self.observation.now_s

    def may_shrink(self, pool: Pool) -> bool:
        """Whether enough is known to take replicas away. Arrivals are counted by decode replicas, for both pools."""
        silent = self.num_stale[pool] + self.num_stale["decode"]
        return not silent and self.observation.arrivals is not None

    def idle_s(self, pool: Pool) -> float:
        """Seconds for which nothing has needed the pool."""
        return self.now_s - self.traffic_s[pool]

    def is_idle(self, pool: Pool) -> bool:
        """Whether that is long enough to go to the minimum."""
        return self.idle_s(pool) >= self.settings.scale_to_zero_delay_s


def understand(observation: Observation, settings: PolicySettings, memory: Memory) -> Situation:
    """The situation that the observation shows, in the light of what is remembered."""
    fresh = {pool: _find_fresh(observation.pool(pool), settings.staleness_s) for pool in POOLS}
    num_stale = {pool: _count_running(observation.pool(pool)) - len(fresh[pool]) for pool in POOLS}
    is_complete = observation.arrivals is not None and not num_stale["decode"]
    windows = memory.windows
    if is_complete:
        windows = remember_arrivals(windows, observation.arrivals, observation.now_s, settings.history)
    demand = _estimate(observation, settings, windows, is_complete)
    scales = _measure_scales(observation, settings, memory, fresh, demand)
    costs = settings.costs.scaled(scales[0] or 1.0, scales[1] or 1.0)
    decode_load = build_decode_load(demand.requests_per_s, demand.lengths, settings.expected_completion_tokens)
    return Situation(
        observation=observation,
        settings=settings,
        fresh=fresh,
        num_stale=num_stale,
        windows=windows,
        demand=demand,
        prefill_scale=scales[0],
        decode_scale=scales[1],
        costs=costs,
        prefill_load=_build_prefill_load(settings, demand, costs, decode_load),
        decode_load=decode_load,
        traffic_s=_see_traffic(observation, memory, fresh, num_stale),
    )


def _find_fresh(pool: PoolState, staleness_s: float) -> list[Replica]:
    return [replica for replica in pool.replicas if replica.state == "running" and replica.age_s <= staleness_s]


def _count_running(pool: PoolState) -> int:
    return sum(replica.state == "running" for replica in pool.replicas)


def _estimate(observation: Observation, settings: PolicySettings, windows: list[Window], is_complete: bool) -> Demand:
    demand = estimate_demand(windows, observation.arrivals, observation.now_s, settings)
    if is_complete or observation.arrivals is None:
        return demand
    # With a decode replica silent, what is left of the reports can show more than was known, never less.
    past = estimate_demand(windows, None, observation.now_s, settings)
    return max(demand, past, key=lambda found: found.uncached_tokens_per_s)


def _measure_scales(
    observation: Observation,
    settings: PolicySettings,
    memory: Memory,
    fresh: dict[Pool, list[Replica]],
    demand: Demand,
) -> tuple[float | None, float | None]:
    elapsed_s = None if memory.updated_s is None else observation.now_s - memory.updated_s
    prefill = measure_prefill_scale(fresh["prefill"], settings.costs, demand.lengths)
    decode = measure_decode_scale(fresh["decode"], settings.costs)
    return smooth_scale(memory.prefill_scale, prefill, elapsed_s), smooth_scale(memory.decode_scale, decode, elapsed_s)


def _build_prefill_load(settings: PolicySettings, demand: Demand, costs: Costs, decode_load: DecodeLoad) -> PrefillLoad:
    # The first token comes out of a step of a decode replica that is as full as its target allows.
    full_step_s = costs.decode_step_s(costs.max_num_seqs, decode_load.context_tokens)
    first_step_s = max(min(settings.targets.tpot_s, full_step_s), costs.step_s)
    return build_prefill_load(demand.requests_per_s, demand.lengths, costs, first_step_s, settings.arrival_variability)


def _see_traffic(
    observation: Observation, memory: Memory, fresh: dict[Pool, list[Replica]], num_stale: dict[Pool, int]
) -> dict[Pool, float]:
    """When each pool was last needed. One of which nothing is remembered counts as needed now."""
    # With no decode replica nobody can say how long the waiting prompts are: both pools start, side by side.
    wakes_all = observation.decode.target == 0 and observation.decode.waiting_requests > 0
    arrived = observation.arrivals.lengths.total if observation.arrivals else None
    seen: dict[Pool, float] = {}
    for pool in POOLS:
        is_needed = (
            arrived is None
            or wakes_all
            or (arrived.uncached_tokens if pool == "prefill" else arrived.requests) > 0
            or observation.pool(pool).waiting_requests > 0
            or num_stale[pool] > 0
            or any(replica.running_requests > 0 or replica.queued_prompt_tokens > 0 for replica in fresh[pool])
        )
        seen[pool] = observation.now_s if is_needed else memory.traffic_s.get(pool, observation.now_s)
    return seen
