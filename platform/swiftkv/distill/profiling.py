"""What each cut and group size would cost a teacher before any training, and how alike its layers' states are.

Loads the teacher once; the student of every cut is made of it in place. Keeps, for each row, the states at each cut:
about 20 MiB for 512 tokens of an 8B model at five cuts. Does not train.
Called by: cli/profiling.py.
Calls: model/convert.py, model/modeling.py, distill/losses.py.
Source: SwiftKV (arXiv 2410.03960) section 3.1 for the similarity of hidden states.

Shapes: T tokens, D hidden, L states (one more than layers), P positions of a tile, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from swiftkv.distill.losses import TILE_LOGITS, compute_logits_kl
from swiftkv.errors import ConfigError
from swiftkv.model.convert import convert_teacher, initialise_student, resolve_cut
from swiftkv.model.modeling import SwiftKVForCausalLM
from swiftkv.model.states import Boundary
from swiftkv.spec import SwiftKVSpec
from swiftkv.text import Rows

OnStage = Callable[[str], None]

_PROMPT_TOKENS = 2000
"""Length of the prompts for which a cut's FLOPs are counted."""


@dataclass(frozen=True)
class CutCost:
    """A student of this cut before distillation, against its teacher."""

    num_key_value_layers: int
    key_value_group_size: int
    skipped_frac: float
    """Part of the layers that prompt tokens skip."""
    flop_speedup: float
    """How many times fewer FLOPs a token of a 2,000-token prompt costs."""
    kv_bytes_frac: float
    """KV bytes per token over the teacher's."""
    kl_nats: float
    """KL(teacher || student) per position."""
    agreement_frac: float
    """Part of the positions where both find the same next token most likely."""


@dataclass(frozen=True)
class TeacherProfile:
    """What `profile_teacher` found."""

    positions: int
    state_similarity: list[float]
    """Mean cosine of the residual stream entering layer i and leaving it, for each layer i."""
    later_similarity: list[float]
    """The same of the stream entering layer i and entering each later layer: what a cut before i relies on."""
    cuts: list[CutCost]

    def recommend(self, max_kl_nats: float) -> CutCost | None:
        """The cut that saves most FLOPs, then most KV bytes, at no more than this KL; None if each costs more."""
        cheap = [cut for cut in self.cuts if cut.kl_nats <= max_kl_nats]
        return max(cheap, key=lambda cut: (cut.flop_speedup, -cut.kv_bytes_frac), default=None)


def list_cuts(folder: Path, kept_layers: Sequence[int] | None, group_sizes: Sequence[int]) -> list[SwiftKVSpec]:
    """The cuts to profile, in every group size that divides their later layers.

    `kept_layers` None takes every eighth of the depth from a quarter to three quarters.
    Raises: CheckpointError if the teacher cannot be used; ConfigError for a cut that does not fit it, or that none of
    the group sizes fits.
    """
    depth = resolve_cut(folder, None).shape.num_hidden_layers
    asked = kept_layers or sorted({round(depth * eighths / 8) for eighths in range(2, 7)} - {0, depth})
    specs = []
    for kept in asked:
        if not 1 <= kept < depth:
            raise ConfigError(f"--cuts: {kept} layers cannot be kept of the teacher's {depth}; give 1 to {depth - 1}.")
        fitting = [resolve_cut(folder, kept, size) for size in group_sizes if (depth - kept) % size == 0]
        if not fitting and kept_layers:
            sizes = ", ".join(map(str, group_sizes))
            raise ConfigError(
                f"--group-sizes: none of {sizes} divides the {depth - kept} layers that follow {kept}. Add 1."
            )
        specs += fitting
    if not specs:
        raise ConfigError(f"--group-sizes: none divides the later layers of any cut of {depth} layers. Add 1.")
    return specs


@torch.no_grad()
def profile_teacher(folder: Path, rows: Rows, specs: Sequence[SwiftKVSpec], on_stage: OnStage) -> TeacherProfile:
    """Compare the untrained student of each cut with the teacher, at every position of the rows.

    Raises: what `convert_teacher` raises.
    """
    on_stage(f"loading {folder}")
    model = convert_teacher(folder, min(spec.num_key_value_layers for spec in specs))  # with projections from there on
    model.eval()
    on_stage(f"running the teacher on {len(rows)} rows of {rows.shape[1]} tokens")
    cuts = {spec.num_key_value_layers for spec in specs}
    run = [_run_teacher(model, row, cuts) for row in torch.from_numpy(rows.astype(np.int64))]
    costs = []
    for index, spec in enumerate(specs, start=1):
        on_stage(
            f"cut {index} of {len(specs)}: {spec.num_key_value_layers} layers, groups of {spec.key_value_group_size}"
        )
        model.model.spec = spec
        initialise_student(model)
        scores = torch.stack([_score(model, teacher, spec.num_key_value_layers) for teacher in run]).sum(0) / rows.size
        costs.append(_describe(spec, *scores.tolist()))
    successive, later = torch.stack([teacher.similarity for teacher in run]).mean(0).round(decimals=6).tolist()
    return TeacherProfile(rows.size, successive, later, costs)


@dataclass
class _TeacherRow:
    """The teacher's pass over one row."""

    boundaries: dict[int, Boundary]
    """Cut -> what its first half hands on."""
    last_TD: Tensor
    similarity: Tensor
    """Of each layer's state with the next one and with all later ones, mean over positions; [2, layers]."""


def _run_teacher(model: SwiftKVForCausalLM, input_ids_T: Tensor, cuts: set[int]) -> _TeacherRow:
    decoder = model.model
    states: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: states.append(args[0])) for layer in decoder.layers]
    decoder.spec = decoder.spec.teacher  # whose first half is all of it
    whole = decoder.compute_boundary(input_ids_T.unsqueeze(0))
    for hook in hooks:
        hook.remove()
    states.append(whole.hidden_BTD)
    unit_LTD = F.normalize(torch.cat(states).float(), dim=-1)
    cosines_LL = torch.einsum("atd,btd->ab", unit_LTD, unit_LTD) / len(input_ids_T)
    later = [row[index + 1 :].mean() for index, row in enumerate(cosines_LL[:-1])]
    similarity = torch.stack([cosines_LL.diagonal(1), torch.stack(later)])
    boundaries = {cut: Boundary(states[cut], whole.position_embeddings, whole.causal_mask) for cut in cuts}
    return _TeacherRow(boundaries, decoder.norm(whole.hidden_BTD)[0], similarity)


def _score(model: SwiftKVForCausalLM, teacher: _TeacherRow, cut: int) -> Tensor:
    """KL and agreement, each summed over the row's positions."""
    student_TD = model.model.run_student_half(teacher.boundaries[cut]).last_BTD[0]
    total = torch.zeros(2, dtype=torch.float64)
    positions_per_tile = max(1, TILE_LOGITS // model.lm_head.out_features)
    tiles_of = (torch.split(states, positions_per_tile) for states in (student_TD, teacher.last_TD))
    for tiles in zip(*tiles_of, strict=True):
        student_PV, teacher_PV = (model.lm_head(tile) for tile in tiles)
        agreement = (student_PV.argmax(-1) == teacher_PV.argmax(-1)).sum()
        total += torch.stack([compute_logits_kl(student_PV, teacher_PV, 1.0), agreement]).double()
    return total


def _describe(spec: SwiftKVSpec, kl_nats: float, agreement_frac: float) -> CutCost:
    return CutCost(
        spec.num_key_value_layers,
        spec.key_value_group_size,
        round(spec.num_later_layers / spec.shape.num_hidden_layers, 4),
        round(spec.compute_prefill_speedup(_PROMPT_TOKENS), 4),
        round(spec.num_kv_caches / spec.shape.num_hidden_layers, 4),
        round(kl_nats, 6),
        round(agreement_frac, 6),
    )
