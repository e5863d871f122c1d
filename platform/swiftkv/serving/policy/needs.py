"""What the situation asks of each pool: the size for the demand, and floors under it where something is seen to lack.

Called by: serving/policy/decision.py. Calls: prefill, decode.
"""

import math

from swiftkv.serving.policy.damping import Need
from swiftkv.serving.policy.decode import predict_batch, size_decode
from swiftkv.serving.policy.prefill import size_prefill
from swiftkv.serving.policy.reasons import Reasons
from swiftkv.serving.policy.settings import Pool
from swiftkv.serving.policy.situation import Situation

WAITING_FRAC = 0.1
"""Share of a prefill replica's busy time above which waiting for KV space is a lack of decode replicas."""

SATURATED_FRAC = 0.98
"""Of its time a pool that lags behind computes all; a window of one that does not can be nearly as full by chance."""

CERTAINTY = 1.0
"""Standard errors of the number of requests by which demand must be above what a pool can take before it grows for it;
what is seen to lack, such as a queue, needs none."""

ROOM_OVER_BEST = 1.25
"""Where a target is out of reach, it is sized for this many times what one request alone would take."""


def need_prefill(situation: Situation, reasons: Reasons) -> Need:
    """Prefill replicas that keep the TTFT target."""
    load, settings = situation.prefill_load, situation.settings
    target = _reachable_ttft_s(situation, reasons)
    growth, unsure = situation.demand.growth_frac["prefill"], _grow_for_growing(situation)

    def size(frac: float) -> int:
        return size_prefill(load.grown(frac), target, settings.targets.percentile, settings.highest_load_frac)

    now = size(unsure)
    up = _explain_growth(situation, reasons, "prefill", now, size((1 + growth) * (1 + unsure) - 1), growth)
    if load.busy > 0:
        reasons.say(
            "demand",
            "prefill",
            f"{situation.demand.uncached_tokens_per_s:.0f} prompt tokens/s in prompts of variability "
            f"{load.service_variability:.2g} keep {load.busy:.2f} replicas busy; {up} keep TTFT in {target:.3g} s",
        )
    floor = max(_floor_of_backlog(situation, reasons), _floor_of_computing(situation, reasons))
    down = size(_grow_for_shrinking(situation, "prefill"))
    return _bound(situation, reasons, "prefill", Need(max(up, floor), max(down, up, floor)))


def need_decode(situation: Situation, reasons: Reasons) -> Need:
    """Decode replicas that keep the TPOT target and have room for the KV."""
    load, settings = situation.decode_load, situation.settings
    target = _reachable_tpot_s(situation, reasons)
    growth, unsure = situation.demand.growth_frac["decode"], _grow_for_growing(situation)

    def size(frac: float) -> int:
        return size_decode(
            load.grown(frac), situation.costs, target, settings.targets.percentile, settings.highest_load_frac
        )

    now = size(unsure)
    up = _explain_growth(situation, reasons, "decode", now, size((1 + growth) * (1 + unsure) - 1), growth)
    if load.tokens_per_s > 0:
        batch = predict_batch(load, situation.costs, up, settings.targets.percentile)
        reasons.say(
            "demand",
            "decode",
            f"{load.tokens_per_s:.0f} completion tokens/s at {load.context_tokens:.0f} tokens of context; {up} "
            f"replicas run {batch.high:.0f} sequences and {batch.high_kv_tokens / situation.costs.kv_tokens:.0%} of KV",
        )
    floor = max(_floor_of_kv(situation, reasons), _floor_of_waiting(situation, reasons))
    down = size(_grow_for_shrinking(situation, "decode"))
    return _bound(situation, reasons, "decode", Need(max(up, floor), max(down, up, floor)))


def _grow_for_growing(situation: Situation) -> float:
    """By how much less demand than the present one a larger pool is not wanted yet: it may be chance. That lengths vary
    is no reason to wait."""
    return -CERTAINTY * situation.demand.error_frac["decode"]


def _grow_for_shrinking(situation: Situation, pool: Pool) -> float:
    """By how much more demand than the present one a smaller pool must be able to take."""
    growth, error = situation.demand.growth_frac[pool], situation.demand.error_frac[pool]
    return (1 + growth) * (1 + situation.settings.hysteresis_frac + error) - 1


def _reachable_ttft_s(situation: Situation, reasons: Reasons) -> float:
    targets = situation.settings.targets
    best = situation.prefill_load.alone_quantile_s(targets.percentile)
    if best <= targets.ttft_s:
        return targets.ttft_s
    reasons.say(
        "ttft_unreachable",
        "prefill",
        f"{targets.percentile:.0%} of prompts within {targets.ttft_s:g} s cannot be had with any number of replicas: "
        f"one of these prompts alone takes {best:.3g} s; sized for {ROOM_OVER_BEST * best:.3g} s. "
        "Set ttft_s to that, or use faster prefill replicas",
    )
    return ROOM_OVER_BEST * best


def _reachable_tpot_s(situation: Situation, reasons: Reasons) -> float:
    target = situation.settings.targets.tpot_s
    best = situation.costs.decode_step_s(1, situation.decode_load.context_tokens)
    if best <= target or situation.decode_load.tokens_per_s <= 0:
        return target
    reasons.say(
        "tpot_unreachable",
        "decode",
        f"{target:g} s per token cannot be had with any number of replicas: a step of one sequence takes "
        f"{best:.3g} s; sized for {ROOM_OVER_BEST * best:.3g} s. Set tpot_s to that, or use faster decode replicas",
    )
    return ROOM_OVER_BEST * best


def _explain_growth(situation: Situation, reasons: Reasons, pool: Pool, now: int, later: int, growth: float) -> int:
    if later > now:
        ahead = situation.settings.limits(pool).startup_s
        reasons.say("trend", pool, f"demand grows by {growth:.0%} in the {ahead:.0f} s a start takes: {now} to {later}")
    return max(now, later)


def _floor_of_backlog(situation: Situation, reasons: Reasons) -> int:
    """Replicas that work off what waits beyond what the target allows, after those that start now are up.

    In prompt tokens: ten short prompts are not ten long ones.
    """
    state, settings, load = situation.observation.prefill, situation.settings, situation.prefill_load
    queued = sum(replica.queued_prompt_tokens for replica in situation.fresh["prefill"])
    total = situation.demand.lengths.total
    queued += state.waiting_requests * (total.uncached_tokens / total.requests if total.requests else 0)
    rate = situation.demand.uncached_tokens_per_s
    if not queued or load.busy <= 0:
        return 0
    per_replica = rate / load.busy  # tokens/s that one replica computes of this mix
    excess = queued - rate * settings.targets.ttft_s
    supply = per_replica * len([r for r in state.replicas if r.state != "draining"])
    later = excess + (rate - supply) * settings.prefill.startup_s
    if excess <= 0 or later <= 0:
        return 0
    floor = math.ceil((rate + later / settings.backlog_s) / per_replica)
    reasons.say(
        "backlog", "prefill", f"{queued:.0f} prompt tokens wait, {later:.0f} too many by then: {floor} replicas"
    )
    return floor


def _floor_of_computing(situation: Situation, reasons: Reasons) -> int:
    """Replicas among which the measured computing is spread thinly enough.

    Only computing counts: exporting and waiting for decode's KV space are not for want of prefill replicas.
    """
    busy = sum(replica.computing_s / max(replica.window_s, 1e-3) for replica in situation.fresh["prefill"])
    floor = math.ceil(busy / situation.settings.highest_load_frac - 1e-6)
    if busy > SATURATED_FRAC * len(situation.fresh["prefill"]):
        reasons.say(
            "busy", "prefill", f"{len(situation.fresh['prefill'])} replicas compute {busy:.2f} s per second: {floor}"
        )
        return floor
    return 0


def _floor_of_kv(situation: Situation, reasons: Reasons) -> int:
    used = sum(replica.kv_usage_frac for replica in situation.fresh["decode"])
    floor = math.ceil(used / situation.settings.highest_load_frac - 1e-6)
    if floor > len(situation.fresh["decode"]) > 0:
        reasons.say(
            "kv_usage", "decode", f"KV of {used:.2f} replicas is in use in {len(situation.fresh['decode'])}: {floor}"
        )
        return floor
    return 0


def _floor_of_waiting(situation: Situation, reasons: Reasons) -> int:
    waiting = sum(replica.waiting_for_decode_s for replica in situation.fresh["prefill"])
    all_s = waiting + sum(replica.computing_s + replica.exporting_s for replica in situation.fresh["prefill"])
    running = len(situation.fresh["decode"])
    if not running or waiting <= WAITING_FRAC * all_s:
        return 0
    frac = waiting / all_s
    floor = math.ceil(running / max(1 - frac, 0.5))
    reasons.say(
        "waiting_for_decode",
        "decode",
        f"prefill replicas spend {frac:.0%} of their busy time waiting for KV space in {running} decode replicas: "
        f"{floor} of those",
    )
    return floor


def _bound(situation: Situation, reasons: Reasons, pool: Pool, need: Need) -> Need:
    """The need within the pool's limits: at least one while anything needs it, the minimum when idle for long."""
    limits, target = situation.settings.limits(pool), situation.observation.pool(pool).target
    if situation.is_idle(pool):
        need = Need(0, 0)
        reasons.say("idle", pool, f"nothing has needed the pool for {situation.idle_s(pool):.0f} s")
    elif target > 0:
        need = Need(need.up, max(need.down, 1))
    elif situation.idle_s(pool) <= 0:
        need = Need(max(need.up, 1), max(need.down, 1))
        reasons.say("from_zero", pool, "the pool is empty and something needs it")
    if need.up > limits.max_replicas:
        reasons.say("at_max", pool, f"{need.up} replicas are needed; max_replicas is {limits.max_replicas}")
    return Need(
        min(max(need.up, limits.min_replicas), limits.max_replicas),
        min(max(need.down, limits.min_replicas), limits.max_replicas),
    )
