"""How far the student is from the teacher: KL of the softened logits, and MSE of a hidden state.

Computed from hidden states, a tile of positions at a time, so that the logits of a large vocabulary never exist whole.
The LM head is frozen.
Called by: distill/step.py, distill/loop.py (learning rate), distill/profiling.py.

Shapes: N positions that count, P positions of a tile, D hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftkv.errors import ShapeError
from swiftkv.model.precision import find_product_dtype

TILE_LOGITS = 2**23
"""Logits of a tile, of student and of teacher each: 32 MiB in float32. Seven such buffers exist at once."""

TileLoss = Callable[[Tensor, Tensor], Tensor]
"""Sum of a loss over the positions of a tile, from the student's hidden states and the teacher's, [P, D] each."""


def sum_logits_kl(student_ND: Tensor, teacher_ND: Tensor, lm_head_VD: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of the logits softened by `temperature`, summed over positions.

    Shapes: hidden states after the final norm, [N, D] each; the LM head's weight [V, D].
    Units: nats; multiplied by the squared temperature.
    Gradients reach the student's hidden states only. No positions give 0.
    Raises: ShapeError if the hidden states differ in shape.
    Source: Hinton et al. 2015, section 2 (the factor of the squared temperature).
    """
    # Once, not once per tile: autocast remembers only what it casts of weights that are trained.
    lm_head_VD = lm_head_VD.to(find_product_dtype(lm_head_VD))

    def compute(student_PD: Tensor, teacher_PD: Tensor) -> Tensor:
        return compute_logits_kl(F.linear(student_PD, lm_head_VD), F.linear(teacher_PD, lm_head_VD), temperature)

    return sum_by_tiles(compute, student_ND, teacher_ND, max(1, TILE_LOGITS // len(lm_head_VD)))


def compute_logits_kl(student_PV: Tensor, teacher_PV: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of logits softened by `temperature`, summed over positions, computed in float32."""
    teacher = F.log_softmax(teacher_PV.float() / temperature, dim=-1)
    student = F.log_softmax(student_PV.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2


def sum_hidden_loss(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Mean squared difference of hidden states, summed over positions. Shapes: [N, D] each. No positions give 0.

    Raises: ShapeError if the hidden states differ in shape.
    """
    return sum_by_tiles(_compute_hidden_loss, student_ND, teacher_ND, max(1, TILE_LOGITS // student_ND.shape[-1]))


def _compute_hidden_loss(student_PD: Tensor, teacher_PD: Tensor) -> Tensor:
    return (student_PD.float() - teacher_PD.float()).square().mean(-1).sum()


def sum_by_tiles(compute: TileLoss, student_ND: Tensor, teacher_ND: Tensor, positions_per_tile: int) -> Tensor:
    """`compute` summed over tiles of positions, with the memory of one tile and of the states' gradient.

    The gradient is taken tile by tile as well, while the loss is computed, so `compute` runs once per tile.
    """
    if student_ND.shape != teacher_ND.shape:
        raise ShapeError(
            f"Student hidden states are {tuple(student_ND.shape)}, the teacher's {tuple(teacher_ND.shape)}: "
            "both must come from the same positions."
        )
    total: Tensor = _SumByTiles.apply(student_ND, teacher_ND, compute, positions_per_tile)  # type: ignore[no-untyped-call]
    return total


class _SumByTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_ND: Tensor, teacher_ND: Tensor, compute: TileLoss, positions_per_tile: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=student_ND.device)
        gradient_ND = torch.empty_like(student_ND)
        tiles = zip(
            *(torch.split(part, positions_per_tile) for part in (student_ND, teacher_ND, gradient_ND)), strict=True
        )
        for student_PD, teacher_PD, gradient_PD in tiles:
            with torch.enable_grad():
                leaf = student_PD.detach().requires_grad_()
                loss = compute(leaf, teacher_PD)
            gradient_PD.copy_(torch.autograd.grad(loss, leaf)[0])
            total += loss.detach()
        ctx.save_for_backward(gradient_ND)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * upstream, None, None, None


def compute_learning_rate_factor(step: int, steps: int, warmup_frac: float) -> float:
    """Part of the peak learning rate at `step` of `steps`: linear warm-up, then linear decay towards 0."""
    warmup_steps = max(1, round(steps * warmup_frac))
    return min((step + 1) / warmup_steps, (steps - step) / max(1, steps - warmup_steps + 1))
