"""Corrects the prior costs by what running replicas measured: one factor for prefill, one for decode.

Smoothed over a minute, so that one odd report changes no pool's size.
Called by: serving/policy/decision.py. Calls: costs.
"""

import math
from collections.abc import Sequence

from swiftkv.serving.policy.costs import Costs
from swiftkv.serving.policy.lengths import Lengths
from swiftkv.serving.policy.observation import Replica

SMOOTHING_S = 60.0
MIN_EVIDENCE_S = 1.0
"""Seconds of measured work below which the old factor stays."""

_RANGE = (0.05, 20.0)


def measure_prefill_scale(replicas: Sequence[Replica], costs: Costs, lengths: Lengths) -> float | None:
    """Measured seconds of computing over those the costs give for as many tokens of prompts of such lengths.

    None: too little was measured.
    """
    total = lengths.total
    if total.uncached_tokens <= 0:
        return None
    expected_s = sum(b.requests * costs.prefill_s(b.uncached_tokens / b.requests) for b in lengths.arrived())
    per_token_s = expected_s / total.uncached_tokens
    expected = per_token_s * sum(replica.computed_prompt_tokens for replica in replicas)
    return _divide(sum(replica.computing_s for replica in replicas), expected)


def measure_decode_scale(replicas: Sequence[Replica], costs: Costs) -> float | None:
    """Measured seconds of decode steps over those the costs give for the same steps. None: too little was measured."""
    expected = sum(
        replica.steps * costs.step_s
        + replica.step_sequences * costs.step_s_per_sequence
        + replica.step_context_tokens * costs.step_s_per_context_token
        for replica in replicas
    )
    return _divide(sum(replica.steps_s for replica in replicas), expected)


def smooth_scale(old: float | None, measured: float | None, elapsed_s: float | None) -> float | None:
    """The factor after `elapsed_s` in which `measured` was seen."""
    if measured is None or old is None or elapsed_s is None:
        return old if measured is None else measured
    weight = 1 - math.exp(-max(0.0, elapsed_s) / SMOOTHING_S)
    return old + weight * (measured - old)


def _divide(measured_s: float, expected_s: float) -> float | None:
    if measured_s < MIN_EVIDENCE_S or expected_s <= 0:
        return None
    return min(max(measured_s / expected_s, _RANGE[0]), _RANGE[1])
