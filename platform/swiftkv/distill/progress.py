"""The progress of a run as lines of text that people read and the command line turns into a live view.

Called by: distill/records.py (writes), cli/follow.py (reads job logs).
"""

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

_LINE = re.compile(r"distill step=(\d+)/(\d+) ((?:\w+=\S+ ?)+)")


@dataclass(frozen=True)
class Progress:
    """Where a run is. Losses and the gradient's norm are means over the steps since the last line."""

    step: int
    steps: int
    loss: float
    logits_kl: float
    hidden_loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_s: float
    """Of all workers: every position of their rows."""
    flops_per_s: float
    """Of all workers, by the FLOP model."""
    memory_gib: float
    """Of the first worker: the most that was in use on its GPU, or what the process holds on a CPU."""
    remaining_s: float

    def format_line(self) -> str:
        """One line of the job's log."""
        values = {name: value for name, value in asdict(self).items() if name not in ("step", "steps")}
        figures = " ".join(f"{name}={value:.6g}" for name, value in values.items())
        return f"distill step={self.step}/{self.steps} {figures}"


def parse_progress(line: str) -> Progress | None:
    """The progress in a line of a job's log (which Ray may have prefixed), or None."""
    match = _LINE.search(line)
    if match is None:
        return None
    figures = dict(word.split("=", 1) for word in match[3].split())
    names = [field.name for field in fields(Progress)][2:]
    if set(figures) != set(names):
        return None
    values: dict[str, Any] = {name: float(figures[name]) for name in names}
    return Progress(int(match[1]), int(match[2]), **values)
