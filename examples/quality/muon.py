"""Muon, an optimizer for matrices, in float32.

torch.optim.Muon multiplies in bfloat16; a processor without such instructions takes five times as long for it as for
float32. Not for vectors and embeddings.
Called by: teacher.py. Calls: torch.
Source: K. Jordan and others, "Muon: An optimizer for hidden layers in neural networks", 2024.

Shapes: M matrices of one shape, R rows, C columns.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""The source's: they bring singular values near 1 in few steps rather than to exactly 1."""
_NUM_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal; weight decay as AdamW has it."""

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every matrix, those of one shape together."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                gradients = [self._add_momentum(parameter, group["momentum"]) for parameter in parameters]
                rate = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for parameter, update in zip(parameters, compute_orthogonal(torch.stack(gradients)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _add_momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        average: Tensor = state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum)


def compute_orthogonal(matrices_MRC: Tensor) -> Tensor:
    """Matrices with the same singular vectors and singular values near 1 (0.5 to 1.5), by Newton-Schulz steps.

    Shapes: [M, R, C] -> [M, R, C].
    """
    is_tall = matrices_MRC.shape[1] > matrices_MRC.shape[2]
    values = matrices_MRC.mT if is_tall else matrices_MRC
    values = values / (values.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_NUM_STEPS):
        gram = values @ values.mT
        values = a * values + (b * gram + c * gram @ gram) @ values
    return values.mT if is_tall else values
