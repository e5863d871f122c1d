"""One distillation step: the shared first half once, then the later half as teacher and as student.

The student's later half runs only where a loss is taken: what it would compute elsewhere changes nothing.
A module, so that it can be wrapped for several workers. Does not read data or move the optimizer (loop.py).
Called by: distill/worker.py (builds), distill/loop.py (runs), bench/.
Calls: model/modeling.py, distill/losses.py.

Shapes: B rows, T tokens, S positions chosen of each row, N positions that count.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from swiftkv.distill.losses import sum_hidden_loss, sum_logits_kl
from swiftkv.model.modeling import SwiftKVForCausalLM
from swiftkv.model.states import Boundary, LaterStates, choose_positions


@dataclass
class Batch:
    """Rows of tokens and the positions at which student and teacher are compared."""

    input_ids_BT: Tensor
    positions_BS: Tensor | None = None
    """Of each row; None: all of them."""
    counts_BS: Tensor | None = None
    """False where a row has fewer positions than S and one only fills up; None: all count."""
    position_ids_BT: Tensor | None = None
    """Of each token in its document, none of which sees another; None: every row is one document."""

    @classmethod
    def from_mask(cls, input_ids_BT: Tensor, mask_BT: Tensor, position_ids_BT: Tensor | None = None) -> "Batch":
        """Rows with a loss where the mask is True, on the device of the mask."""
        if bool(mask_BT.all()):
            return cls(input_ids_BT, position_ids_BT=position_ids_BT)
        positions_BS, counts_BS = choose_positions(mask_BT)
        return cls(input_ids_BT, positions_BS, None if bool(counts_BS.all()) else counts_BS, position_ids_BT)

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        tensors = (self.input_ids_BT, self.positions_BS, self.counts_BS, self.position_ids_BT)
        return Batch(*(None if tensor is None else tensor.to(device) for tensor in tensors))  # type: ignore[arg-type]

    def split(self, rows: int | None) -> list["Batch"]:
        """Batches of at most so many rows; None: this one."""
        if rows is None or rows >= len(self.input_ids_BT):
            return [self]
        tensors = (self.input_ids_BT, self.positions_BS, self.counts_BS, self.position_ids_BT)
        return [
            Batch(*(None if tensor is None else tensor[first : first + rows] for tensor in tensors))  # type: ignore[arg-type]
            for first in range(0, len(self.input_ids_BT), rows)
        ]


class DistillStep(nn.Module):
    """Computes the losses of a batch; gradients reach only what `freeze_teacher` left trainable."""

    def __init__(
        self,
        model: SwiftKVForCausalLM,
        temperature: float,
        hidden_loss_weight: float,
        teacher_rows: int | None = None,
    ) -> None:
        """`teacher_rows`: rows that first half and teacher take at a time, to save memory; None: all of a batch."""
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.hidden_loss_weight = hidden_loss_weight
        self.teacher_rows = teacher_rows

    def forward(self, batch: Batch, num_positions: float) -> dict[str, Tensor]:
        """Losses of the batch's positions, each a sum over `num_positions`.

        Returns: `loss` with gradient, and its parts `logits_kl` and `hidden_loss` without.
        """
        teacher, student = self.run_halves(batch)
        keep = slice(None) if batch.counts_BS is None else batch.counts_BS.flatten()
        student_ND, teacher_ND = (states.last_BTD.flatten(0, 1)[keep] for states in (student, teacher))
        num_positions = max(num_positions, 1)
        logits_kl = sum_logits_kl(student_ND, teacher_ND, self.model.lm_head.weight, self.temperature) / num_positions
        student_ND, teacher_ND = (states.penultimate_BTD.flatten(0, 1)[keep] for states in (student, teacher))
        hidden_loss = sum_hidden_loss(student_ND, teacher_ND) / num_positions
        loss = logits_kl + self.hidden_loss_weight * hidden_loss
        return {"loss": loss, "logits_kl": logits_kl.detach(), "hidden_loss": hidden_loss.detach()}

    def run_halves(self, batch: Batch) -> tuple[LaterStates, LaterStates]:
        """States of teacher and student at the batch's positions."""
        with torch.no_grad():
            frozen = [self._run_frozen(part) for part in batch.split(self.teacher_rows)]
            boundary = Boundary.concatenate([boundary for boundary, _ in frozen])
            teacher = LaterStates.concatenate([teacher for _, teacher in frozen])
        return teacher, self.model.model.run_student_half(boundary, batch.positions_BS)

    def _run_frozen(self, batch: Batch) -> tuple[Boundary, LaterStates]:
        """What takes no gradient: the first half of both, and the teacher's later half."""
        decoder = self.model.model
        boundary = decoder.compute_boundary(batch.input_ids_BT, position_ids=batch.position_ids_BT)
        return boundary, decoder.run_teacher_half(boundary, batch.positions_BS)
