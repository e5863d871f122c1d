"""How many prompt tokens per second a model's engines get through: given, or measured while they are busy.

Called by: gateway/fair_queue.py.
"""

import math

MEMORY_S = 60.0
"""Time constant over which old measurements fade."""

MIN_BUSY_S = 0.5
"""Busy time before a measurement is believed."""


class PrefillRate:
    """Prompt tokens over the time in which any were being worked on. Times are seconds of one clock."""

    def __init__(self, given_per_s: float | None) -> None:
        self.given_per_s = given_per_s
        self._tokens = 0.0
        self._busy_s = 0.0
        self._seen_s: float | None = None

    def pass_time(self, now_s: float, is_busy: bool) -> None:
        """The time since the last call counts as busy or not. To be called before anything changes."""
        elapsed_s = now_s - self._seen_s if self._seen_s is not None else 0.0
        self._seen_s = now_s
        if is_busy:
            fade = math.exp(-elapsed_s / MEMORY_S)
            self._tokens *= fade
            self._busy_s = self._busy_s * fade + elapsed_s

    def add(self, tokens: int) -> None:
        """These prompt tokens are done."""
        self._tokens += tokens

    @property
    def tokens_per_s(self) -> float | None:
        """None until there is a measurement."""
        if self.given_per_s is not None:
            return self.given_per_s
        return self._tokens / self._busy_s if self._busy_s >= MIN_BUSY_S and self._tokens else None
