"""What the policy remembers between decisions: past windows of arrivals, corrections of the costs, past needs.

Plain JSON when dumped, because Ray keeps it as a dictionary.
Called by: serving/policy/decision.py and what it calls; serving/autoscaling.py keeps it.
"""

from pydantic import Field

from swiftkv.config import StrictModel


class Window(StrictModel):
    """Arrivals of a past window."""

    end_s: float
    seconds: float
    lengths: dict[str, list[float]]
    """As `Lengths.to_json` writes them."""


class PastNeed(StrictModel):
    """What a pool needed, with hysteresis."""

    at_s: float
    replicas: int


class Memory(StrictModel):
    """All of it; empty at first."""

    windows: list[Window] = Field(default_factory=list)
    """Oldest first, not overlapping."""

    prefill_scale: float | None = None
    """Measured seconds of prefill over those of the settings' costs. None: nothing measured yet."""

    decode_scale: float | None = None
    """The same of decode."""

    updated_s: float | None = None
    """When the last decision was taken."""

    needs: dict[str, list[PastNeed]] = Field(default_factory=dict)
    """By pool: those of the delay before a pool shrinks that no later one exceeds, so the first is the largest."""

    traffic_s: dict[str, float] = Field(default_factory=dict)
    """By pool, when something was last seen to need it."""
