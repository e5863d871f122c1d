"""What can be set about sizing the two pools. Every value has a unit in its name or in its text.

Refuses what can never work before anything runs; what only the traffic can show, `decision` says in its reasons.
Called by: serving/autoscaling.py, serving's own settings, capacity.
"""

from typing import Literal

from pydantic import Field, model_validator

from swiftkv.config import StrictModel
from swiftkv.serving.policy.costs import Costs

Pool = Literal["prefill", "decode"]
POOLS: tuple[Pool, Pool] = ("prefill", "decode")


class Targets(StrictModel):
    """What users were promised."""

    ttft_s: float = Field(gt=0)
    """Seconds to the first token."""

    tpot_s: float = Field(gt=0)
    """Seconds per output token after the first, averaged over a request."""

    percentile: float = Field(default=0.95, gt=0.5, lt=1)
    """Fraction of requests that must meet each of them."""


class PoolLimits(StrictModel):
    """How small and large one pool may be, and what a replica of it takes."""

    min_replicas: int = Field(default=1, ge=0)
    """0: the pool ends when nothing arrives, and begins with the first request."""

    max_replicas: int = Field(default=8, ge=1)
    """Never more than this, whatever the demand."""

    devices_per_replica: int = Field(default=1, ge=1)
    """Devices (GPUs, or cores on a CPU machine) that one replica takes."""

    startup_s: float = Field(default=120, ge=0)
    """Seconds from the decision to a replica that answers. The policy looks this far ahead."""

    @model_validator(mode="after")
    def _check_range(self) -> "PoolLimits":
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas ({self.min_replicas}) is above max_replicas ({self.max_replicas}); "
                f"raise max_replicas to {self.min_replicas} or lower min_replicas"
            )
        return self


class PolicySettings(StrictModel):
    """How a prefill pool and a decode pool are sized together."""

    targets: Targets
    """TTFT and TPOT, and for how many requests."""

    costs: Costs
    """The prior of what work costs; what replicas measure corrects it. `costs.build_costs` makes it from the spec."""

    prefill: PoolLimits = PoolLimits()
    """Limits of the prefill pool."""

    decode: PoolLimits = PoolLimits()
    """Limits of the decode pool. min_replicas 0 means that a first request waits for a start."""

    device_budget: int | None = Field(default=None, ge=1)
    """Devices that both pools may take together. None: only max_replicas limits them."""

    expected_prompt_tokens: int | None = Field(default=None, ge=1)
    """Uncached prompt tokens that the TTFT target must allow at its percentile; settings that cannot meet it with any
    number of replicas are refused. None: unknown, and the policy says so in its reasons once it sees the traffic."""

    expected_completion_tokens: int = Field(default=256, ge=1)
    """Completion tokens of a request, until requests have finished."""

    history: int = Field(default=20, ge=2, le=100)
    """Windows of arrivals that are remembered; how long a window is, the observation says (usually 30 s)."""

    significance: float = Field(default=4, gt=0)
    """Standard deviations by which traffic must differ from before to count as changed. Less reacts faster, and to
    noise: simulated Poisson traffic seemed to change 7 times an hour with 3, twice with 3.5, every second hour with
    4."""

    max_growth_frac: float = Field(default=1, ge=0)
    """The most that a trend may add to the present demand when looking ahead; 1 doubles it, 0 turns trends off."""

    arrival_variability: float = Field(default=1, gt=0)
    """Squared coefficient of variation of the times between arrivals: 1 is Poisson, more is burstier."""

    hysteresis_frac: float = Field(default=0.1, ge=0)
    """A smaller pool must also meet the targets with this much more demand; otherwise none is taken away."""

    scale_down_delay_s: float = Field(default=300, ge=0)
    """Seconds for which less must have been enough before a pool shrinks. Growing waits for nothing."""

    scale_to_zero_delay_s: float = Field(default=600, ge=0)
    """Seconds without any request after which a pool goes to min_replicas at once."""

    staleness_s: float = Field(default=60, gt=0)
    """Age in seconds from which a replica's report counts as missing; nothing shrinks on it. At least three
    times the interval at which replicas report (Ray: 10 s)."""

    highest_load_frac: float = Field(default=0.9, gt=0, lt=1)
    """Fraction of time a prefill replica computes, and of KV space a decode replica uses, above which there must be
    more of them, whatever the model of queueing says."""

    backlog_s: float = Field(default=60, gt=0)
    """Seconds in which a queue that is longer than the TTFT target allows must be worked off."""

    drain: Literal["any", "named", "waits"] = "any"
    """Who keeps KV that is yet to be pulled from vanishing. any: whoever executes decisions picks the replica, so none
    is drained while one holds such KV. named: only replicas that the decision names are drained. waits: a replica's
    own shutdown waits until its KV is pulled or its lease is over, so any may be drained."""

    @model_validator(mode="after")
    def _check_budget(self) -> "PolicySettings":
        least = sum(getattr(self, pool).min_replicas * getattr(self, pool).devices_per_replica for pool in POOLS)
        if self.device_budget is not None and least > self.device_budget:
            raise ValueError(
                f"device_budget ({self.device_budget}) is less than min_replicas of both pools take ({least}); "
                f"raise it to {least} or lower min_replicas"
            )
        return self

    @model_validator(mode="after")
    def _check_targets(self) -> "PolicySettings":
        prompt = self.expected_prompt_tokens or 1
        ttft, tpot = self.costs.alone_ttft_s(prompt), self.costs.decode_step_s(1, prompt)
        if ttft > self.targets.ttft_s:
            raise ValueError(
                f"targets.ttft_s ({self.targets.ttft_s:g}) cannot be met with any number of replicas: one prompt of "
                f"{prompt} tokens alone takes {ttft:.3g} s; set ttft_s to {1.25 * ttft:.2g} or more, expect shorter "
                "prompts, or use faster prefill replicas"
            )
        if tpot > self.targets.tpot_s:
            raise ValueError(
                f"targets.tpot_s ({self.targets.tpot_s:g}) cannot be met with any number of replicas: a decode step "
                f"of one sequence takes {tpot:.3g} s; set tpot_s to {1.25 * tpot:.2g} or more, or use faster decode "
                "replicas"
            )
        return self

    def limits(self, pool: Pool) -> PoolLimits:
        """The limits of one pool."""
        return self.prefill if pool == "prefill" else self.decode
