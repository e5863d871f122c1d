"""Compares a student with its teacher on held-out rows: perplexities, agreement and KL.

Through the Hugging Face model, with the first half computed once for both. Does not decide whether a version
is good enough.
Called by: cli/evaluate.py, evaluate/tasks.py.
Calls: model/modeling.py, model/states.py.

Shapes: B rows, T tokens, S positions chosen of each row, N scored positions, D hidden, V vocabulary.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from swiftkv.model.modeling import SwiftKVForCausalLM
from swiftkv.model.states import choose_positions
from swiftkv.text import Rows

_BATCH_LOGITS_BYTES = 2**28


@dataclass(frozen=True)
class Comparison:
    """Student against teacher, averaged over the positions that were scored."""

    positions: int
    teacher_perplexity: float
    student_perplexity: float
    agreement_frac: float
    """Part of the positions where both find the same next token most likely."""
    kl_nats: float
    """KL(teacher || student) per position."""


def compute_batch_tokens(vocab_size: int) -> int:
    """Tokens of a batch whose logits, of which a handful of copies exist at once, are at most 256 MiB each."""
    return _BATCH_LOGITS_BYTES // (4 * vocab_size)


def split_batches(rows: Rows, vocab_size: int) -> list[Rows]:
    """The rows in batches of at most `compute_batch_tokens`, or of one row."""
    rows_per_batch = max(1, compute_batch_tokens(vocab_size) // rows.shape[1])
    return [rows[first : first + rows_per_batch] for first in range(0, len(rows), rows_per_batch)]


def compare_with_teacher(model: SwiftKVForCausalLM, batches: Iterable[Rows]) -> Comparison:
    """Score teacher and student on every position that predicts a token of the rows; there must be at least one.

    Raises: CheckpointError if the checkpoint was stored without its teacher.
    """
    ids = (torch.from_numpy(rows.astype(np.int64)) for rows in batches)
    return compare_at_positions(model, ((ids_BT, torch.ones_like(ids_BT, dtype=torch.bool)) for ids_BT in ids))


@torch.no_grad()
def compare_at_positions(model: SwiftKVForCausalLM, batches: Iterable[tuple[Tensor, Tensor]]) -> Comparison:
    """Score teacher and student where `predicts` is True; there must be at least one such position.

    Shapes: a batch is input_ids [B, T] and predicts [B, T] bool; that of the last position is not looked at.
    Raises: CheckpointError if the checkpoint was stored without its teacher.
    """
    model.eval()
    sums, positions = np.zeros(4), 0
    for ids_BT, predicts_BT in batches:
        scored_BT = predicts_BT[:, :-1]
        boundary = model.model.compute_boundary(ids_BT)
        positions_BS, counts_BS = choose_positions(scored_BT)
        # Where every position is scored, plain causal attention is the faster one.
        chosen_BS = None if bool(scored_BT.all()) else positions_BS
        teacher_ND, student_ND = (
            run_half(boundary, chosen_BS).last_BTD[:, : positions_BS.shape[1]][counts_BS]
            for run_half in (model.model.run_teacher_half, model.model.run_student_half)
        )
        teacher_NV, student_NV = (
            F.log_softmax(model.lm_head(states_ND).float(), dim=-1) for states_ND in (teacher_ND, student_ND)
        )
        sums += _sum_scores(teacher_NV, student_NV, ids_BT[:, 1:][scored_BT])
        positions += int(scored_BT.sum())
    teacher_nll, student_nll, agreement, kl = (float(value) / positions for value in sums)
    return Comparison(positions, math.exp(teacher_nll), math.exp(student_nll), agreement, kl)


def _sum_scores(teacher_NV: Tensor, student_NV: Tensor, targets_N: Tensor) -> np.ndarray:
    teacher_nll = F.nll_loss(teacher_NV, targets_N, reduction="sum")
    student_nll = F.nll_loss(student_NV, targets_N, reduction="sum")
    agreement = (teacher_NV.argmax(-1) == student_NV.argmax(-1)).sum()
    kl = F.kl_div(student_NV, teacher_NV, reduction="sum", log_target=True)
    return np.array([float(teacher_nll), float(student_nll), float(agreement), float(kl)])
