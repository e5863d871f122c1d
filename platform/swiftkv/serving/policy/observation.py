"""What the policy is told: both pools' replicas, what waits, and what arrived lately.

Records only; where they come from is the caller's business.
Called by: serving/autoscaling.py and capacity, which build them; the other files of serving/policy.
"""

from dataclasses import dataclass, field
from typing import Literal

from swiftkv.serving.policy.lengths import Lengths
from swiftkv.serving.policy.settings import Pool


@dataclass(frozen=True)
class Replica:
    """One replica. Rates and times are of its last window, which is `window_s` long; the rest is of this moment."""

    name: str
    state: Literal["starting", "running", "draining"] = "running"
    age_s: float = 0
    """Seconds since it reported; infinite if it never did."""
    window_s: float = 30
    """Seconds that its sums below cover."""
    queued_prompt_tokens: float = 0
    """Uncached tokens of prompts that it has taken and not yet computed."""
    running_requests: float = 0
    """Requests that it computes or decodes."""
    kv_usage_frac: float = 0
    """Fraction of its KV space in use."""
    pending_kv_tokens: float = 0
    """Tokens of KV that it holds only because another replica is yet to pull them."""
    computed_prompt_tokens: float = 0
    """Prompt tokens that it computed."""
    computing_s: float = 0
    """Seconds in which it computed prompts."""
    exporting_s: float = 0
    """Seconds in which it had nothing to compute and KV was yet to be fetched."""
    waiting_for_decode_s: float = 0
    """Seconds in which prompts had no KV blocks, because those of others were yet to be fetched."""
    steps: float = 0
    """Decode steps."""
    steps_s: float = 0
    """Seconds that they took."""
    step_sequences: float = 0
    """Sum over the steps of the sequences in each."""
    step_context_tokens: float = 0
    """Sum over the steps of the context tokens of all sequences in each."""


@dataclass(frozen=True)
class PoolState:
    """One pool."""

    target: int
    """Replicas it was last told to have."""
    replicas: tuple[Replica, ...] = ()
    waiting_requests: float = 0
    """Requests that wait for it outside of any replica."""


@dataclass(frozen=True)
class Arrivals:
    """What arrived at both pools together in the last `window_s` seconds."""

    window_s: float
    lengths: Lengths


@dataclass(frozen=True)
class Observation:
    """Everything that a decision depends on, besides settings and memory."""

    now_s: float
    """Any clock that only goes forward."""
    prefill: PoolState
    decode: PoolState
    arrivals: Arrivals | None
    """None: nobody knows. Nothing arrived is an empty histogram."""
    notes: tuple[str, ...] = field(default=())
    """What the caller wants to see in the decision's record, such as the source of the figures."""

    def pool(self, pool: Pool) -> PoolState:
        """One of the two pools."""
        return self.prefill if pool == "prefill" else self.decode
