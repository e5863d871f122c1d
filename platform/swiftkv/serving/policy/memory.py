"""What the policy remembers between decisions: past windows of arrivals, corrections of the costs, running delays.

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


class Hold(StrictModel):
    """A pool for which less would do."""

    since_s: float
    ceiling: int
    """The most that was needed since then."""


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

    holds: dict[str, Hold] = Field(default_factory=dict)
    """By pool."""

    traffic_s: dict[str, float] = Field(default_factory=dict)
    """By pool, when something was last seen to need it."""
