"""Which rows belong to which step, whatever the number of workers.

Rows are prepared once (text.py), before the workers start, and read by index.
Called by: distill/loop.py.
"""

import numpy as np
import numpy.typing as npt


def choose_rows(step: int, rows_per_step: int, num_rows: int, seed: int) -> npt.NDArray[np.int64]:
    """Row numbers of a step: each epoch is one shuffle of all rows.

    Depends on nothing but its arguments, so that any number of workers sees the same batches.
    """
    first = step * rows_per_step
    positions = np.arange(first, first + rows_per_step)
    chosen = np.empty(rows_per_step, dtype=np.int64)
    for epoch in np.unique(positions // num_rows):
        order = np.random.default_rng((seed, int(epoch))).permutation(num_rows)
        here = positions // num_rows == epoch
        chosen[here] = order[positions[here] % num_rows]
    return chosen
