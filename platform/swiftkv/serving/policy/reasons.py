"""Why a decision is what it is: a bounded set of codes, each with a text that holds the figures.

Called by: serving/policy/needs.py, serving/policy/decision.py, serving/autoscaling.py.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

from swiftkv.serving.policy.settings import Pool

Code = Literal[
    "demand",  # what arrives asks for this size
    "trend",  # and will have grown when a new replica is up
    "backlog",  # prompts wait that would not be worked off in time
    "busy",  # prefill replicas compute nearly all the time
    "kv_usage",  # decode replicas are nearly full
    "waiting_for_decode",  # prefill replicas cannot hand their KV over
    "from_zero",  # the pool was empty and something needs it
    "idle",  # nothing has needed the pool for long
    "ttft_unreachable",  # no number of replicas keeps the target
    "tpot_unreachable",
    "at_max",  # more are needed than max_replicas allows
    "budget",  # or than the devices allow
    "stale",  # replicas did not report, so nothing shrinks
    "hold",  # less would do, but not for long enough yet
    "kv_pending",  # less would do, but KV there is yet to be pulled
]
CODES: tuple[Code, ...] = get_args(Code)


@dataclass(frozen=True)
class Reason:
    """One thing that made the decision what it is."""

    code: Code
    pool: Pool
    text: str


@dataclass
class Reasons:
    """Reasons that gather while a decision is taken."""

    found: list[Reason] = field(default_factory=list)

    def say(self, code: Code, pool: Pool, text: str) -> None:
        """Add one."""
        self.found.append(Reason(code, pool, text))
