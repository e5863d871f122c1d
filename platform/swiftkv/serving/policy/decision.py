"""Decides how many replicas both pools should have, and says why.

`decide` is pure: the same observation, settings and memory give the same decision. It executes nothing; a decision
names what may be drained, and the caller keeps the memory.
Called by: serving/autoscaling.py, capacity. Calls: situation, needs, damping, budget, in this order.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from swiftkv.serving.policy.budget import Claim, divide
from swiftkv.serving.policy.damping import Damped, Need, count_drainable, damp, find_drainable
from swiftkv.serving.policy.decode import predict_tpot_s
from swiftkv.serving.policy.memory import Memory
from swiftkv.serving.policy.needs import need_decode, need_prefill
from swiftkv.serving.policy.observation import Observation
from swiftkv.serving.policy.prefill import predict_ttft_s
from swiftkv.serving.policy.reasons import Reason, Reasons
from swiftkv.serving.policy.settings import POOLS, PolicySettings, Pool
from swiftkv.serving.policy.situation import Situation, understand


@dataclass(frozen=True)
class PoolDecision:
    """What one pool gets."""

    replicas: int
    needed: int
    """Replicas that the demand needs within the pool's limits, before delays and budget."""
    drainable: tuple[str, ...]
    """Replicas that hold no KV which is yet to be pulled, those with the least work first."""
    may_drain: int
    """How many replicas may be taken away at this moment."""


@dataclass(frozen=True)
class Decision:
    """Sizes of both pools, why, and what to remember."""

    prefill: PoolDecision
    decode: PoolDecision
    predicted_ttft_s: float
    """At the percentile with these sizes; infinite if the queue would grow for ever."""
    predicted_tpot_s: float
    """The same of TPOT."""
    reasons: tuple[Reason, ...]
    inputs: dict[str, Any]
    """Every figure that the decision rests on, as JSON."""
    memory: Memory

    def pool(self, pool: Pool) -> PoolDecision:
        """What one of the pools gets."""
        return self.prefill if pool == "prefill" else self.decode

    def to_record(self) -> dict[str, Any]:
        """The decision with its inputs as JSON, for a log line. Infinite figures are null."""
        pools = {f"{pool}_{key}": getattr(self.pool(pool), key) for pool in POOLS for key in ("replicas", "needed")}
        return {
            **pools,
            "predicted_ttft_s": _finite(self.predicted_ttft_s),
            "predicted_tpot_s": _finite(self.predicted_tpot_s),
            "reasons": [asdict(reason) for reason in self.reasons],
            "inputs": self.inputs,
        }


def decide(observation: Observation, settings: PolicySettings, memory: Memory) -> Decision:
    """How many replicas both pools should have now.

    Total: every observation gets a decision. Targets that no size can meet give the best size and a reason.
    """
    reasons = Reasons()
    situation = understand(observation, settings, memory)
    needs: dict[Pool, Need] = {
        "prefill": need_prefill(situation, reasons),
        "decode": need_decode(situation, reasons),
    }
    damped = {pool: _damp(situation, reasons, memory, pool, needs[pool]) for pool in POOLS}
    drainable = {pool: find_drainable(observation.pool(pool), settings) for pool in POOLS}
    may_drain = {pool: count_drainable(observation.pool(pool), drainable[pool], settings) for pool in POOLS}
    claims = {pool: _claim(situation, reasons, pool, needs[pool], damped[pool], may_drain[pool]) for pool in POOLS}
    sizes = _fit(situation, reasons, claims)
    pools = {pool: PoolDecision(sizes[pool], needs[pool].up, drainable[pool], may_drain[pool]) for pool in POOLS}
    percentile = settings.targets.percentile
    return Decision(
        prefill=pools["prefill"],
        decode=pools["decode"],
        predicted_ttft_s=predict_ttft_s(situation.prefill_load, sizes["prefill"], percentile),
        predicted_tpot_s=predict_tpot_s(situation.decode_load, situation.costs, sizes["decode"], percentile),
        reasons=tuple(reasons.found),
        inputs=_describe(situation, may_drain),
        memory=_remember(situation, damped),
    )


def _damp(situation: Situation, reasons: Reasons, memory: Memory, pool: Pool, need: Need) -> Damped:
    settings, limits = situation.settings, situation.settings.limits(pool)
    current = min(max(situation.observation.pool(pool).target, limits.min_replicas), limits.max_replicas)
    may_shrink = situation.may_shrink(pool)
    delay_s = 0.0 if situation.is_idle(pool) else settings.scale_down_delay_s
    damped = damp(need, current, memory.needs.get(pool, ()), situation.now_s, may_shrink, delay_s)
    if not may_shrink:
        silent = situation.num_stale[pool] or situation.num_stale["decode"]
        reasons.say("stale", pool, f"{silent} running replicas did not report; nothing shrinks")
    elif need.down < damped.replicas == current:
        needed = damped.needs[0]
        ago_s = situation.now_s - needed.at_s
        reasons.say("hold", pool, f"{need.down} replicas would do; {needed.replicas} were needed {ago_s:.0f} s ago")
    return damped


def _claim(situation: Situation, reasons: Reasons, pool: Pool, need: Need, damped: Damped, may_drain: int) -> Claim:
    limits, target = situation.settings.limits(pool), situation.observation.pool(pool).target
    undrainable = max(0, target - may_drain)
    if damped.replicas < undrainable:
        reasons.say("kv_pending", pool, f"{damped.replicas} would do, but {may_drain} replicas may be drained now")
    # What another pool needs is taken at once, not after a delay; but not on metrics that nobody reported.
    least = max(limits.min_replicas, undrainable)
    wanted = max(damped.replicas, least)
    needed = min(need.down, wanted) if situation.may_shrink(pool) else wanted
    return Claim(max(needed, need.up), wanted, least, target, limits.devices_per_replica)


def _fit(situation: Situation, reasons: Reasons, claims: dict[Pool, Claim]) -> dict[Pool, int]:
    """The sizes within the budget."""
    prefill, decode = divide(claims["prefill"], claims["decode"], situation.settings.device_budget)
    sizes: dict[Pool, int] = {"prefill": prefill, "decode": decode}
    _wait_for_devices(situation, sizes)
    for pool in POOLS:
        if sizes[pool] < claims[pool].needed:
            reasons.say("budget", pool, f"{claims[pool].needed} needed, {sizes[pool]} fit into the devices")
    return sizes


def _wait_for_devices(situation: Situation, sizes: dict[Pool, int]) -> None:
    """Takes growth back whose devices are still in replicas that drain."""
    budget, observation = situation.settings.device_budget, situation.observation
    devices = {pool: situation.settings.limits(pool).devices_per_replica for pool in POOLS}
    draining = {pool: sum(r.state == "draining" for r in observation.pool(pool).replicas) for pool in POOLS}
    if budget is None or not any(draining.values()):
        return
    missing = sum((sizes[pool] + draining[pool]) * devices[pool] for pool in POOLS) - budget
    for pool in POOLS:
        # Below its minimum a pool grows whatever drains: without it, nothing is served.
        grown = sizes[pool] - max(observation.pool(pool).target, situation.settings.limits(pool).min_replicas)
        if missing > 0 and grown > 0:
            taken = min(grown, math.ceil(missing / devices[pool]))
            sizes[pool] -= taken
            missing -= taken * devices[pool]


def _remember(situation: Situation, damped: dict[Pool, Damped]) -> Memory:
    return Memory(
        windows=situation.windows,
        prefill_scale=situation.prefill_scale,
        decode_scale=situation.decode_scale,
        updated_s=situation.now_s,
        needs={pool: damped[pool].needs for pool in POOLS},
        traffic_s=dict(situation.traffic_s.items()),
    )


def _describe(situation: Situation, may_drain: dict[Pool, int]) -> dict[str, Any]:
    demand, prefill, decode = situation.demand, situation.prefill_load, situation.decode_load
    percentile = situation.settings.targets.percentile
    return {
        "requests_per_s": _round(demand.requests_per_s),
        "uncached_prompt_tokens_per_s": _round(demand.uncached_tokens_per_s),
        "completion_tokens_per_s": _round(decode.tokens_per_s),
        "stretch_s": _round(demand.stretch_s),
        "prefill_growth_frac": _round(demand.growth_frac["prefill"]),
        "decode_growth_frac": _round(demand.growth_frac["decode"]),
        "prefill_busy_replicas": _round(prefill.busy),
        "prefill_service_variability": _round(prefill.service_variability),
        "prefill_alone_ttft_s": _round(prefill.alone_quantile_s(percentile)),
        "completion_tokens": _round(decode.completion_tokens),
        "context_tokens": _round(decode.context_tokens),
        "prefill_scale": _round(situation.prefill_scale),
        "decode_scale": _round(situation.decode_scale),
        "pools": {pool: _describe_pool(situation, pool) | {"may_drain": may_drain[pool]} for pool in POOLS},
        "notes": list(situation.observation.notes),
    }


_SUMMED = (
    "queued_prompt_tokens",
    "running_requests",
    "kv_usage_frac",
    "pending_kv_tokens",
    "computing_s",
    "exporting_s",
    "waiting_for_decode_s",
)


def _describe_pool(situation: Situation, pool: Pool) -> dict[str, Any]:
    state, fresh = situation.observation.pool(pool), situation.fresh[pool]
    states = [replica.state for replica in state.replicas]
    return {
        "target": state.target,
        **{name: states.count(name) for name in ("starting", "running", "draining")},
        "stale": situation.num_stale[pool],
        "waiting_requests": _round(state.waiting_requests),
        **{name: _round(sum(getattr(replica, name) for replica in fresh)) for name in _SUMMED},
    }


def _finite(value: float) -> float | None:
    return _round(value) if math.isfinite(value) else None


def _round(value: float | None) -> float | None:
    """Four significant digits: what a person reads in a log line."""
    return None if value is None else float(f"{value:.4g}")
