"""Compares a student with its teacher on held-out rows: perplexities, agreement and KL.

Through the Hugging Face model, with the first half computed once for both. Does not decide whether a version
is good enough.
Called by: cli/evaluate.py.
Calls: model/modeling.py.

Shapes: B rows, T tokens, V vocabulary.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from swiftkv.model.modeling import SwiftKVForCausalLM
from swiftkv.text import Rows

_BATCH_LOGITS_BYTES = 2**28


@dataclass(frozen=True)
class Comparison:
    """Student against teacher, averaged over all positions that predict a token of the rows."""

    positions: int
    teacher_perplexity: float
    student_perplexity: float
    agreement_frac: float
    """Part of the positions where both find the same next token most likely."""
    kl_nats: float
    """KL(teacher || student) per position."""


def split_batches(rows: Rows, vocab_size: int) -> list[Rows]:
    """The rows in batches whose logits, of which a handful of copies exist at once, are at most 256 MiB each."""
    rows_per_batch = max(1, _BATCH_LOGITS_BYTES // (4 * rows.shape[1] * vocab_size))
    return [rows[first : first + rows_per_batch] for first in range(0, len(rows), rows_per_batch)]


@torch.no_grad()
def compare_with_teacher(model: SwiftKVForCausalLM, batches: Iterable[Rows]) -> Comparison:
    """Score teacher and student on the rows; there must be at least one.

    Raises: CheckpointError if the checkpoint was stored without its teacher.
    """
    model.eval()
    sums, positions = np.zeros(4), 0
    for rows in batches:
        input_ids_BT = torch.from_numpy(rows.astype(np.int64))
        boundary = model.model.compute_boundary(input_ids_BT)
        teacher_BTV = _compute_log_probabilities(model, model.model.run_teacher_half(boundary).last_BTD)
        student_BTV = _compute_log_probabilities(model, model.model.run_student_half(boundary).last_BTD)
        sums += _sum_scores(teacher_BTV, student_BTV, input_ids_BT[:, 1:])
        positions += input_ids_BT[:, 1:].numel()
    teacher_nll, student_nll, agreement, kl = (float(value) / positions for value in sums)
    return Comparison(positions, math.exp(teacher_nll), math.exp(student_nll), agreement, kl)


def _compute_log_probabilities(model: SwiftKVForCausalLM, last_BTD: Tensor) -> Tensor:
    return F.log_softmax(model.lm_head(last_BTD[:, :-1]).float(), dim=-1)


def _sum_scores(teacher_BTV: Tensor, student_BTV: Tensor, targets_BT: Tensor) -> np.ndarray:
    teacher_nll = F.nll_loss(teacher_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")
    student_nll = F.nll_loss(student_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")
    agreement = (teacher_BTV.argmax(-1) == student_BTV.argmax(-1)).sum()
    kl = F.kl_div(student_BTV, teacher_BTV, reduction="sum", log_target=True)
    return np.array([float(teacher_nll), float(student_nll), float(agreement), float(kl)])
