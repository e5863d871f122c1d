"""Says when a loss can no longer be trusted. Does not stop the run (loop.py).

Called by: distill/loop.py.
"""

import math
from collections import deque
from collections.abc import Iterable

_WINDOW = 20


class DivergenceGuard:
    """Compares each loss with the mean of the last ones."""

    def __init__(self, spike_factor: float | None, losses: Iterable[float] = ()) -> None:
        """`spike_factor`: see `training.spike_factor` in a recipe. `losses`: of the steps before."""
        self._factor = spike_factor
        self._losses: deque[float] = deque(losses, maxlen=_WINDOW)

    def find_problem(self, loss: float, gradient_norm: float) -> str | None:
        """What is wrong with a step, in words, or None; a sound loss is remembered."""
        for name, value in (("loss", loss), ("gradient's norm", gradient_norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}"
        if self._factor is not None and len(self._losses) == _WINDOW:
            mean = sum(self._losses) / _WINDOW
            if loss > self._factor * mean > 0:
                return f"the loss is {loss:.4g}, {loss / mean:.1f} times the mean of the last {_WINDOW} steps"
        self._losses.append(loss)
        return None
