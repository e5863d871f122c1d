"""A request of a load, and what became of it.

Called by: loadgen/client.py, loadgen/replay.py, and whoever reads a load's outcome.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Outcome = Literal["complete", "told", "broken", "silent"]


@dataclass(frozen=True)
class Request:
    """One request to an OpenAI endpoint."""

    body: dict[str, Any]
    """As JSON; streamed, with usage, unless `stream` is False: of a whole answer only outcome and tokens are noted."""
    arrival_s: float = 0.0
    """Seconds after the load's start."""
    label: str = ""
    """What the load calls requests of this kind."""
    path: str = "completions"
    """Below `/v1`."""
    key: str = "none"
    """API key."""


@dataclass
class Answer:
    """What a client saw of one request. Times are seconds after the load's start."""

    request: Request
    sent_s: float
    chunk_s: list[float] = field(default_factory=list)
    """When each chunk with content came; the first is the first token."""
    finished_s: float = 0.0
    completion_tokens: int = 0
    """As the usage chunk says."""
    token_ids: list[int] = field(default_factory=list)
    """Of the answer, where the body asks for `return_token_ids`."""
    outcome: Outcome = "silent"
    """complete: a finish reason and the stream's end came; told: an HTTP error or an error event did; broken: the
    connection ended in the middle of an answer, which HTTP clients report; silent: none of these."""
    reason: str = ""
    """The finish reason, or what went wrong."""

    @property
    def late_s(self) -> float:
        """By how much the load generator itself was late."""
        return self.sent_s - self.request.arrival_s

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.chunk_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first; nan for fewer than two tokens."""
        if self.completion_tokens < 2:
            return float("nan")
        return (self.chunk_s[-1] - self.chunk_s[0]) / (self.completion_tokens - 1)


def take_completed(answers: Iterable[Answer], label: str | None = None) -> list[Answer]:
    """The complete answers, of one label if one is given."""
    return [a for a in answers if a.outcome == "complete" and label in (None, a.request.label)]


def find_percentile(values: Iterable[float], percentile: float) -> float:
    """The percentile (0 to 100) of the values that are numbers. Raises: ValueError if there is none."""
    numbers = np.array([value for value in values if value == value])
    if not len(numbers):
        raise ValueError("nothing was measured")
    return float(np.percentile(numbers, percentile))
