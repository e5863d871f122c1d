"""The distillation bench: one optimizer step against a step as the reference recipe builds it.

The reference (ArcticTraining) runs teacher and student as two whole forward passes and every position through both.
Here both sides have the same model, batch, tiled loss and optimizer; they take turns, and must give the same loss.
Called by: cli/bench.py.
Calls: distill/step.py, bench/pairs.py.
"""

import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from swiftkv.bench.memory import PeakMemory
from swiftkv.bench.models import LLAMA_8B_SHAPE, TRAINING_SHAPE, build_random_student
from swiftkv.bench.pairs import OnStage, describe_processor, take_turns
from swiftkv.bench.ratios import compute_ratio
from swiftkv.bench.scaling import WorkerGroup
from swiftkv.bench.table import Result, Row
from swiftkv.distill.packing import pack_examples
from swiftkv.distill.step import Batch, DistillStep
from swiftkv.distill.tokenise import Example
from swiftkv.errors import EngineError
from swiftkv.model.modeling import SwiftKVForCausalLM
from swiftkv.model.states import LaterStates
from swiftkv.spec import ModelShape

ROWS = (
    Row("speedup", "optimizer steps/s over the reference's, over what FlopCounterMode allows: loss everywhere", 0.95),
    Row("speedup-answers-only", "the same, loss on the last eighth of each row", 0.95),
    Row(
        "memory", "peak memory of a step beyond the weights, over the reference's: loss on the last eighth", 0.4, False
    ),
    Row("packing", "useful tokens/s of packed rows over those of padded ones, the same documents", None),
    Row("weak-scaling", "tokens/s of two workers of one core and one row each, over one such worker's", None),
)
_ROWS = {row.name: row for row in ROWS}

Shape = tuple[int, ...]


def _count_attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _count_attention_backward(upstream: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(upstream, query, key, value))  # type: ignore[no-untyped-call]


_CPU_ATTENTION = {  # FlopCounterMode knows attention on GPUs only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _count_attention_backward,
}


@dataclass(frozen=True)
class DistillPlan:
    """Sizes of one run of the bench."""

    shape: ModelShape = TRAINING_SHAPE
    row_tokens: int = 1024
    rows: int = 1
    answer_tokens: int = 128
    """At the end of each row, which carry the loss of the answers-only rows."""
    pairs: int = 9
    documents: int = 24
    """Of the packing row."""


class WholePasses(DistillStep):
    """The reference's step: teacher and student each from the tokens, every position through both."""

    def run_halves(self, batch: Batch) -> tuple[LaterStates, LaterStates]:
        """States of teacher and student at the batch's positions."""
        decoder = self.model.model
        with torch.no_grad():
            teacher = decoder.run_teacher_half(decoder.compute_boundary(batch.input_ids_BT))
        student = decoder.run_student_half(decoder.compute_boundary(batch.input_ids_BT))
        if batch.positions_BS is None:
            return teacher, student
        return teacher.select(batch.positions_BS), student.select(batch.positions_BS)


def measure_distillation(plan: DistillPlan, on_stage: OnStage) -> tuple[list[Result], dict[str, Any]]:
    """The rows, and more about what was measured as a flat JSON object.

    Raises: EngineError if the two sides' losses differ by more than 1e-5.
    """
    torch.manual_seed(0)
    model = build_random_student(plan.shape)
    figures: dict[str, Any] = {
        "rows_per_step": plan.rows,
        "hardware": describe_processor(),
        "row_tokens": plan.row_tokens,
    }
    figures |= {"answer_tokens": plan.answer_tokens, "trained_parameters": _count_trained(model)}
    results = []
    for name, batch in (("speedup", build_batch(plan)), ("speedup-answers-only", build_batch(plan, only_answers=True))):
        key = name.replace("-", "_")
        sides = [_Side(kind(model, 2.0, 1.0), batch) for kind in (WholePasses, DistillStep)]
        figures[f"{key}_loss"] = _require_equal_losses(sides)
        allowed = sides[0].count_flops() / sides[1].count_flops()
        reference, ours = take_turns([side.time_step for side in sides], plan.pairs, on_stage, name)
        ratio = compute_ratio(reference, ours)
        figures |= {key: round(ratio.median, 4), f"flop_{key}": round(allowed, 4)}
        figures[f"flop_{key}_8b"] = round(_count_flop_speedup(LLAMA_8B_SHAPE, batch), 4)
        speeds = [f"{1 / statistics.median(seconds):.3f} steps/s" for seconds in (reference, ours)]
        results.append(Result(_ROWS[name], ratio.scale(1 / allowed), *speeds))
        peaks = [side.measure_peak_bytes() for side in sides]
        figures |= {f"{key}_reference_peak_bytes": peaks[0], f"{key}_peak_bytes": peaks[1]}
    results.append(Result(_ROWS["memory"], compute_ratio([peaks[1]], [peaks[0]]), *(f"{p:,} bytes" for p in peaks)))
    results.append(_measure_packing(plan, model, figures, on_stage))
    results.append(_measure_scaling(plan, on_stage))
    return results, figures


def _measure_packing(
    plan: DistillPlan, model: SwiftKVForCausalLM, figures: dict[str, Any], on_stage: OnStage
) -> Result:
    """All documents once, in packed rows and in padded ones, a row at a time."""
    generator = np.random.default_rng(0)
    # Lengths spread as those of instruction data: a few long documents among many short ones.
    lengths = np.exp(generator.normal(np.log(plan.row_tokens / 6), 0.8, plan.documents))
    lengths = lengths.astype(int).clip(8, plan.row_tokens)
    ids = [generator.integers(0, plan.shape.vocab_size, length, dtype=np.int32) for length in lengths]
    examples = [Example(part, np.ones(len(part), dtype=np.bool_)) for part in ids]
    step = DistillStep(model, 2.0, 1.0)
    kinds = [_build_row_batches(examples, plan, packing) for packing in (False, True)]
    sides = [[_Side(step, batch) for batch in batches] for batches in kinds]
    measure = [lambda rows=rows: sum(side.time_step() for side in rows) for rows in sides]
    seconds = take_turns(measure, max(2, plan.pairs // 4), on_stage, "packing")
    used = [float(lengths.sum()) / (len(batches) * plan.row_tokens) for batches in kinds]
    figures |= {"padded_used_frac": round(used[0], 4), "packed_used_frac": round(used[1], 4)}
    speeds = [f"{lengths.sum() / statistics.median(side):,.0f} useful tokens/s" for side in seconds]
    return Result(_ROWS["packing"], compute_ratio(*seconds), *speeds)


def _build_row_batches(examples: list[Example], plan: DistillPlan, packing: bool) -> list[Batch]:
    """One batch per row."""
    batches = []
    for block in pack_examples(examples, plan.row_tokens, fill_token=0, packing=packing):
        for row in range(len(block.input_ids)):
            arrays = (block.input_ids, block.predicts, block.position_ids)
            tensors = [torch.from_numpy(np.ascontiguousarray(array[row : row + 1])) for array in arrays]
            batches.append(Batch.from_mask(tensors[0].long(), tensors[1], tensors[2].long()))
    return batches


def _measure_scaling(plan: DistillPlan, on_stage: OnStage) -> Result:
    groups = [WorkerGroup(world_size, plan.shape, plan.row_tokens) for world_size in (1, 2)]
    try:
        alone, together = take_turns([group.time_step for group in groups], plan.pairs, on_stage, "weak scaling")
    finally:
        for group in groups:
            group.close()
    rates = [
        f"{count * plan.row_tokens / statistics.median(side):,.0f} tokens/s"
        for count, side in ((1, alone), (2, together))
    ]
    return Result(_ROWS["weak-scaling"], compute_ratio(alone, together).scale(2), *rates)


def build_batch(plan: DistillPlan, only_answers: bool = False) -> Batch:
    """Random rows, with the loss everywhere or at the end of each row."""
    generator = torch.Generator().manual_seed(0)
    input_ids_BT = torch.randint(plan.shape.vocab_size, (plan.rows, plan.row_tokens), generator=generator)
    if not only_answers:
        return Batch(input_ids_BT)
    answers_S = torch.arange(plan.row_tokens - plan.answer_tokens, plan.row_tokens)
    return Batch(input_ids_BT, answers_S.expand(plan.rows, -1))


class _Side:
    """One of the two ways to take a step."""

    def __init__(self, step: DistillStep, batch: Batch) -> None:
        self.step, self.batch = step, batch
        self.trained = [parameter for parameter in step.parameters() if parameter.requires_grad]
        # Nothing moves, so that both sides see the same model in every pair.
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, weight_decay=0.0, fused=True)

    def compute_loss(self) -> torch.Tensor:
        positions = self.batch.input_ids_BT if self.batch.positions_BS is None else self.batch.positions_BS
        return self.step(self.batch, positions.numel())["loss"]

    def take_step(self) -> None:
        self.compute_loss().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def time_step(self) -> float:
        """Seconds of one step."""
        started = time.perf_counter()
        self.take_step()
        return time.perf_counter() - started

    def count_flops(self) -> float:
        """FLOPs of forward and backward; causal attention is counted as if it were not, on both sides."""
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
            self.compute_loss().backward()  # type: ignore[no-untyped-call]
        self.optimizer.zero_grad(set_to_none=True)
        return float(counter.get_total_flops())

    def measure_peak_bytes(self) -> int:
        """Most memory that forward and backward hold at once, beyond the weights and their gradients."""
        self.compute_loss().backward()  # type: ignore[no-untyped-call]  # gradients exist from here on, and are added to
        with PeakMemory() as memory:
            self.compute_loss().backward()  # type: ignore[no-untyped-call]
        self.optimizer.zero_grad(set_to_none=True)
        return memory.peak_bytes


def _require_equal_losses(sides: list[_Side]) -> float:
    reference, ours = (float(side.compute_loss().detach()) for side in sides)
    if abs(ours - reference) > 1e-5:
        raise EngineError(
            f"the losses differ, so their speed means nothing: {ours} against the reference's {reference}."
        )
    return ours


def _count_flop_speedup(shape: ModelShape, batch: Batch) -> float:
    """What the FLOPs of another shape allow, counted without computing anything."""
    model = build_random_student(shape, "meta")
    moved = replace(
        batch,
        input_ids_BT=batch.input_ids_BT.to("meta"),
        positions_BS=None if batch.positions_BS is None else batch.positions_BS.to("meta"),
    )
    reference, ours = (_Side(kind(model, 2.0, 1.0), moved).count_flops() for kind in (WholePasses, DistillStep))
    return reference / ours


def _count_trained(model: SwiftKVForCausalLM) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
