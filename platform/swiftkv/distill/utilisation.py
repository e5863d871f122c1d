"""The FLOPs of the steps that a run takes, and what its devices reach at most, where that is known.

FLOPs are those of costs.py, for the rows that each pass really has: nothing is measured.
Called by: distill/loop.py (FLOPs), distill/worker.py (the peak). Calls: distill/costs.py, distill/estimate.py.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from swiftkv.distill.costs import Workload, compute_step_flops
from swiftkv.distill.estimate import DEVICES


def count_step_flops(
    work: Workload, passes: Iterable[npt.NDArray[np.int64]], num_positions: npt.NDArray[np.int64]
) -> float:
    """FLOPs of forward and backward passes over these rows, by number; -1 only fills up, and is computed too.

    `num_positions`: with a loss, of every row there is. Rows of a recipe that packs count as packed.
    """
    total = 0.0
    for numbers in passes:
        counts = np.where(numbers >= 0, num_positions[numbers], 0)
        longest = max(int(counts.max()), 1)  # as in model/states.py: the others are filled up
        parts = compute_step_flops(replace(work, loss_positions=longest), len(numbers), int(counts.sum()))
        total += sum(parts.values())
    return total


def find_peak_flops_per_s(device: torch.device, bfloat16: bool) -> float | None:
    """What such a device reaches at most in dense bfloat16 products, as its maker documents it.

    None for a GPU that estimate.py does not name; for a CPU, whose peak nobody documents; and if products are not in
    bfloat16.
    """
    if device.type != "cuda" or not bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((kind.peak_flops_per_s for kind in DEVICES.values() if name in kind.names), None)
