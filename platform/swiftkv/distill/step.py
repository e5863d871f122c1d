"""One distillation step: the shared first half once, then the later half as teacher and as student.

A module, so that DistributedDataParallel can wrap it. Does not read data or move the optimizer (loop.py).
Called by: distill/loop.py.
Calls: model/modeling.py, distill/losses.py.

Shapes: B rows, T tokens.
"""

import torch
from torch import Tensor, nn

from swiftkv.distill.losses import compute_hidden_loss, compute_logits_kl
from swiftkv.model.modeling import SwiftKVForCausalLM


class DistillStep(nn.Module):
    """Computes the losses of a batch; gradients reach only what `freeze_teacher` left trainable."""

    def __init__(self, model: SwiftKVForCausalLM, temperature: float, hidden_loss_weight: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.hidden_loss_weight = hidden_loss_weight

    def forward(self, input_ids_BT: Tensor, mask_BT: Tensor, num_positions: float) -> dict[str, Tensor]:
        """Losses of the masked-in positions, each a sum over `num_positions`.

        Returns: `loss` with gradient, and its parts `logits_kl` and `hidden_loss` without.
        """
        decoder = self.model.model
        with torch.no_grad():
            boundary = decoder.compute_boundary(input_ids_BT)
            teacher = decoder.run_teacher_half(boundary)
            teacher_BTV = self.model.lm_head(teacher.last_BTD)
        student = decoder.run_student_half(boundary)
        student_BTV = self.model.lm_head(student.last_BTD)

        logits_kl = compute_logits_kl(student_BTV, teacher_BTV, mask_BT, self.temperature, num_positions)
        hidden_loss = compute_hidden_loss(student.penultimate_BTD, teacher.penultimate_BTD, mask_BT, num_positions)
        loss = logits_kl + self.hidden_loss_weight * hidden_loss
        return {"loss": loss, "logits_kl": logits_kl.detach(), "hidden_loss": hidden_loss.detach()}
