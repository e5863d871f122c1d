"""How far the student is from the teacher: KL of the softened logits, and MSE of a hidden state.

Whole logits in memory; the positions that count are given by a mask.
Called by: distill/step.py.

Shapes: B rows, T tokens, D hidden, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor

from swiftkv.errors import ShapeError


def compute_logits_kl(
    student_BTV: Tensor, teacher_BTV: Tensor, mask_BT: Tensor, temperature: float, num_positions: float
) -> Tensor:
    """KL(teacher || student) softened by `temperature`, summed over the masked-in positions / `num_positions`.

    Shapes: logits [B, T, V], any float dtype, computed in fp32; mask [B, T] bool.
    Units: nats per position. An empty mask gives 0.
    Raises: ShapeError if the logits differ in shape.
    Source: Hinton et al. 2015, section 2 (the factor of the squared temperature).
    """
    _require_equal_shapes("logits", student_BTV, teacher_BTV)
    teacher = F.log_softmax(teacher_BTV[mask_BT].float() / temperature, dim=-1)
    student = F.log_softmax(student_BTV[mask_BT].float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2 / max(num_positions, 1)


def compute_hidden_loss(student_BTD: Tensor, teacher_BTD: Tensor, mask_BT: Tensor, num_positions: float) -> Tensor:
    """Mean squared difference of hidden states over the masked-in positions / `num_positions`.

    Shapes: hidden [B, T, D]; mask [B, T] bool. An empty mask gives 0.
    Raises: ShapeError if the hidden states differ in shape.
    """
    _require_equal_shapes("hidden states", student_BTD, teacher_BTD)
    difference = student_BTD[mask_BT].float() - teacher_BTD[mask_BT].float()
    return difference.square().mean(-1).sum() / max(num_positions, 1)


def _require_equal_shapes(what: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ShapeError(
            f"Student {what} are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: "
            "both must come from the same batch and vocabulary."
        )


def compute_learning_rate_factor(step: int, steps: int, warmup_frac: float) -> float:
    """Part of the peak learning rate at `step` of `steps`: linear warm-up, then linear decay towards 0."""
    warmup_steps = max(1, round(steps * warmup_frac))
    return min((step + 1) / warmup_steps, (steps - step) / max(1, steps - warmup_steps + 1))
