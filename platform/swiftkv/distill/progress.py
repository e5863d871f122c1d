"""The progress of a run as lines of text that people read and the command line turns into a bar.

Called by: distill/loop.py (writes), cli/distill.py (reads job logs).
"""

import re
from dataclasses import dataclass

_LINE = re.compile(
    r"distill step=(?P<step>\d+)/(?P<steps>\d+) loss=(?P<loss>\S+) logits_kl=(?P<logits_kl>\S+) "
    r"hidden_loss=(?P<hidden_loss>\S+) learning_rate=(?P<learning_rate>\S+) tokens_per_s=(?P<tokens_per_s>\S+)"
)


@dataclass(frozen=True)
class Progress:
    """Where a run is. Losses are means over the steps since the last line."""

    step: int
    steps: int
    loss: float
    logits_kl: float
    hidden_loss: float
    learning_rate: float
    tokens_per_s: float

    def format_line(self) -> str:
        """One line of the job's log."""
        return (
            f"distill step={self.step}/{self.steps} loss={self.loss:.6g} logits_kl={self.logits_kl:.6g} "
            f"hidden_loss={self.hidden_loss:.6g} learning_rate={self.learning_rate:.3g} "
            f"tokens_per_s={self.tokens_per_s:.4g}"
        )


def parse_progress(line: str) -> Progress | None:
    """The progress in a line of a job's log (which Ray may have prefixed), or None."""
    match = _LINE.search(line)
    if match is None:
        return None
    values = match.groupdict()
    losses = {key: float(values[key]) for key in ("loss", "logits_kl", "hidden_loss")}
    rates = {key: float(values[key]) for key in ("learning_rate", "tokens_per_s")}
    return Progress(int(values["step"]), int(values["steps"]), **losses, **rates)
