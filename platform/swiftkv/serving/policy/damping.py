"""Grows a pool at once and shrinks it late: hysteresis, delays, and KV that somebody is yet to pull.

A pool shrinks only if fewer replicas met the targets with some more demand than there is, to the most that was needed
at any time within a delay.
Called by: serving/policy/decision.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from swiftkv.serving.policy.memory import PastNeed
from swiftkv.serving.policy.observation import PoolState, Replica
from swiftkv.serving.policy.settings import PolicySettings


@dataclass(frozen=True)
class Need:
    """What the demand asks of one pool."""

    up: int
    """Replicas for the demand: fewer are too few."""
    down: int
    """Replicas for the demand with hysteresis: more are too many."""


@dataclass(frozen=True)
class Damped:
    """What becomes of a need."""

    replicas: int
    needs: list[PastNeed]
    """To remember."""


def damp(need: Need, current: int, past: Sequence[PastNeed], now_s: float, may_shrink: bool, delay_s: float) -> Damped:
    """The size after hysteresis and delay. A pool of which nothing is remembered, or that may not shrink, counts as
    needed whole."""
    down = need.down if may_shrink else max(need.down, current)
    past = past or [PastNeed(at_s=now_s, replicas=max(down, current))]
    recent = [entry for entry in past if now_s - entry.at_s < delay_s and entry.replicas > down]
    needs = [*recent, PastNeed(at_s=now_s, replicas=down)]
    return Damped(max(need.up, min(needs[0].replicas, current)), needs)


def find_drainable(pool: PoolState, settings: PolicySettings) -> tuple[str, ...]:
    """Replicas that hold no KV which is yet to be pulled, and said so lately; those with the least work first.

    One that is still starting holds nothing.
    """
    free = [replica for replica in pool.replicas if replica.state != "draining" and _is_free(replica, settings)]
    free.sort(key=lambda replica: (replica.state != "starting", replica.running_requests, replica.name))
    return tuple(replica.name for replica in free)


def count_drainable(pool: PoolState, drainable: tuple[str, ...], settings: PolicySettings) -> int:
    """How many replicas may be taken away now, given who picks them (`settings.drain`)."""
    present = [replica for replica in pool.replicas if replica.state != "draining"]
    # Replicas that were asked for and of which nothing is known yet hold nothing either.
    unborn = max(0, pool.target - len(present))
    if settings.drain == "waits" or (settings.drain == "any" and len(drainable) == len(present)):
        return unborn + len(present)
    if settings.drain == "named":
        return unborn + len(drainable)
    # Ray, for one, takes those first that do not run yet.
    return unborn + sum(replica.state == "starting" for replica in present)


def _is_free(replica: Replica, settings: PolicySettings) -> bool:
    if replica.state == "starting":
        return True
    return replica.pending_kv_tokens <= 0 and replica.age_s <= settings.staleness_s
