"""What each cut and group size would cost a teacher before any training, and how alike its layers' states are.

Loads the teacher once; the student of every cut is made of it in place. Does not train.
Called by: cli/profiling.py.
Calls: model/convert.py, model/modeling.py, distill/losses.py.
Source: SwiftKV (arXiv 2410.03960) section 3.1 for the similarity of hidden states.

Shapes: R rows, T tokens, D hidden, P positions of a tile, V vocabulary.
"""

import itertools
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
from swiftkv.model.modeling import Boundary, SwiftKVForCausalLM
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
    """Mean cosine of the residual stream entering layer i and entering the next one, for each layer i."""
    cuts: list[CutCost]

    def recommend(self, max_kl_nats: float) -> CutCost | None:
        """The cut that saves most FLOPs, then most KV bytes, at no more than this KL; None if each costs more."""
        cheap = [cut for cut in self.cuts if cut.kl_nats <= max_kl_nats]
        return max(cheap, key=lambda cut: (cut.flop_speedup, -cut.kv_bytes_frac), default=None)


def list_cuts(folder: Path, kept_layers: Sequence[int] | None, group_sizes: Sequence[int]) -> list[SwiftKVSpec]:
    """The cuts to profile; None takes every eighth of the depth from a quarter to three quarters.

    A group size that does not fit a cut is left out, unless the cut was asked for by name.
    Raises: CheckpointError if the teacher cannot be used; ConfigError if a cut does not fit it or nothing is left.
    """
    depth = resolve_cut(folder, None).shape.num_hidden_layers
    asked = kept_layers is not None
    kept_layers = kept_layers or sorted({round(depth * eighths / 8) for eighths in range(2, 7)} - {0, depth})
    specs = []
    for kept in kept_layers:
        for group_size in group_sizes:
            try:
                specs.append(resolve_cut(folder, kept, group_size))
            except ConfigError:
                if asked:
                    raise
    if not specs or all(not spec.num_later_layers for spec in specs):
        raise ConfigError(f"{folder}: of its {depth} layers none would be skipped. Choose other cuts or group sizes.")
    return [spec for spec in specs if spec.num_later_layers]


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
    similarity = torch.stack([teacher.similarity for teacher in run]).mean(0)
    return TeacherProfile(rows.size, [round(value, 6) for value in similarity.tolist()], costs)


@dataclass
class _TeacherRow:
    """The teacher's pass over one row."""

    boundaries: dict[int, Boundary]
    """Cut -> what its first half hands on."""
    last_TD: Tensor
    similarity: Tensor
    """Of the states before and after each layer, mean over positions."""


def _run_teacher(model: SwiftKVForCausalLM, input_ids_T: Tensor, cuts: set[int]) -> _TeacherRow:
    decoder = model.model
    states: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: states.append(args[0])) for layer in decoder.layers]
    decoder.spec = decoder.spec.teacher  # whose first half is all of it
    whole = decoder.compute_boundary(input_ids_T.unsqueeze(0))
    for hook in hooks:
        hook.remove()
    states.append(whole.hidden_BTD)
    similarity = [F.cosine_similarity(a.float(), b.float(), dim=-1).mean() for a, b in itertools.pairwise(states)]
    boundaries = {cut: Boundary(states[cut], whole.position_embeddings, whole.causal_mask) for cut in cuts}
    return _TeacherRow(boundaries, decoder.norm(whole.hidden_BTD)[0], torch.stack(similarity))


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
