"""The optimizer steps of a run on one worker, from wherever its last checkpoint left it.

Knows neither Ray nor files: rows, logging, saving and the wish to stop are handed in.
Called by: distill/worker.py.
Calls: distill/data.py (which rows), distill/step.py (one pass), distill/divergence.py, distill/utilisation.py.

Shapes: B rows of a pass, T tokens.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from swiftkv.distill.checkpoints import CURVE_COLUMNS
from swiftkv.distill.data import PackedRows, choose_rows, share_rows
from swiftkv.distill.divergence import DivergenceGuard
from swiftkv.distill.estimate import build_workload
from swiftkv.distill.losses import compute_learning_rate_factor
from swiftkv.distill.recipe import Recipe
from swiftkv.distill.step import Batch, DistillStep
from swiftkv.distill.utilisation import count_step_flops
from swiftkv.model.precision import has_bfloat16_instructions


@dataclass(frozen=True)
class Figures:
    """What one optimizer step gave, the same on every worker."""

    step: int
    """Steps done, this one included."""
    loss: float
    logits_kl: float
    hidden_loss: float
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    num_positions: int
    """Positions with a loss."""
    flops: float
    """Of the passes of all workers."""
    asked_to_stop: bool


@dataclass(frozen=True)
class Ending:
    """Why the loop ended, and after how many steps."""

    kind: Literal["finished", "stopped", "diverged"]
    steps_done: int
    problem: str = ""
    """Of a run that diverged."""


class Surroundings(Protocol):
    """What the loop asks of the worker around it."""

    def log(self, figures: Figures) -> None:
        """A step was taken."""

    def save(self, curve: Tensor) -> None:
        """Begin a checkpoint. Shapes: curve [steps done, columns]."""

    def hand_over(self) -> None:
        """Finish the checkpoint that was begun, if there is one."""

    def wants_to_stop(self) -> bool:
        """Whether somebody asked the run to end; what the first worker says counts."""


@dataclass(frozen=True)
class Place:
    """Which worker this is."""

    rank: int = 0
    world_size: int = 1


class Training:
    """A step with its optimizer, and how far it has come."""

    def __init__(self, step: DistillStep, recipe: Recipe, rows: PackedRows, place: Place = Place()) -> None:
        self.step, self.settings, self.rows, self.place = step, recipe.training, rows, place
        self.trained = [parameter for parameter in step.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=self.settings.learning_rate, weight_decay=0.0, fused=True)
        self.curve = torch.zeros(0, len(CURVE_COLUMNS), dtype=torch.float64)
        """One row per step done, of CURVE_COLUMNS."""
        self.bfloat16 = _agree(uses_bfloat16(self.settings.precision, step), place)
        self._work = build_workload(recipe, step.model.model.spec, weight_bytes=4, loss_frac=1.0, is_gpu=False)

    def choose_rows(self) -> npt.NDArray[np.int64]:
        """The rows of the next step, of all workers."""
        return choose_rows(len(self.curve), self.settings.rows_per_step, len(self.rows), self.settings.seed)

    def share_rows(self, chosen: npt.NDArray[np.int64], rank: int) -> list[npt.NDArray[np.int64]]:
        """Those of each pass of a worker."""
        return share_rows(chosen, rank, self.place.world_size, self.settings.rows_per_pass)

    def count_flops(self, chosen: npt.NDArray[np.int64]) -> float:
        """FLOPs of a step of these rows, of all workers."""
        passes = (numbers for rank in range(self.place.world_size) for numbers in self.share_rows(chosen, rank))
        return count_step_flops(self._work, passes, self.rows.num_positions)


def train(training: Training, checkpoint_every: int, surroundings: Surroundings) -> Ending:
    """Take the steps that are left; the last state is always saved, but for a step that diverged."""
    settings, curve = training.settings, training.curve
    guard = DivergenceGuard(settings.spike_factor, curve[:, 0].tolist())
    while len(training.curve) < settings.steps:
        figures = compute_gradients(training, surroundings.wants_to_stop())
        surroundings.hand_over()  # begun a step ago, so that writing and computing overlap
        problem = guard.find_problem(figures.loss, figures.gradient_norm)
        if problem is not None:
            return Ending("diverged", figures.step - 1, problem)
        training.optimizer.step()
        row = [getattr(figures, column) for column in CURVE_COLUMNS]
        training.curve = torch.cat([training.curve, torch.tensor([row], dtype=torch.float64)])
        surroundings.log(figures)
        ends = figures.asked_to_stop or figures.step == settings.steps
        if ends or figures.step % checkpoint_every == 0:
            surroundings.save(training.curve)
        if ends:
            break
    surroundings.hand_over()
    done = len(training.curve)
    return Ending("finished" if done == settings.steps else "stopped", done)


def compute_gradients(training: Training, wants_to_stop: bool = False) -> Figures:
    """Gradients of the next step's rows, clipped; the weights stay as they are."""
    settings, place = training.settings, training.place
    chosen = training.choose_rows()
    num_positions = int(training.rows.num_positions[chosen].sum())
    passes = training.share_rows(chosen, place.rank)
    training.optimizer.zero_grad(set_to_none=True)
    totals = torch.zeros(4, dtype=torch.float64)  # the three losses, and the wish to stop
    for index, numbers in enumerate(passes):
        if isinstance(training.step, FSDPModule):
            training.step.set_requires_gradient_sync(index == len(passes) - 1)
        totals[:3] += _run_pass(training, numbers, num_positions)
    totals[3] = float(wants_to_stop and place.rank == 0)
    if place.world_size > 1:
        dist.all_reduce(totals)
    norm = torch.nn.utils.clip_grad_norm_(training.trained, settings.max_gradient_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    learning_rate = _set_learning_rate(training)
    loss, logits_kl, hidden_loss, asked_to_stop = totals.tolist()
    done = len(training.curve) + 1
    return Figures(
        done,
        loss,
        logits_kl,
        hidden_loss,
        learning_rate,
        float(norm),
        num_positions,
        training.count_flops(chosen),
        asked_to_stop=bool(asked_to_stop),
    )


def _run_pass(training: Training, numbers: npt.NDArray[np.int64], num_positions: int) -> Tensor:
    """Forward and backward of some rows; their part of the three losses."""
    device = training.trained[0].device
    batch = build_batch(training.rows, numbers, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=training.bfloat16):
        losses = training.step(batch, num_positions=num_positions)
    # Sharded gradients are averaged over the workers, where the batch's gradient is their sum.
    (losses["loss"] * training.place.world_size).backward()
    parts = [losses[name].detach() for name in ("loss", "logits_kl", "hidden_loss")]
    return torch.stack(parts).to("cpu", torch.float64)


def build_batch(rows: PackedRows, numbers: npt.NDArray[np.int64], device: torch.device) -> Batch:
    """Rows by number; -1 is a row without loss, which only fills up."""
    block = rows.read(numbers)
    packs_documents = bool((block.position_ids != np.arange(block.position_ids.shape[1])).any())
    position_ids_BT = torch.from_numpy(block.position_ids.astype(np.int64)) if packs_documents else None
    input_ids_BT = torch.from_numpy(block.input_ids.astype(np.int64))
    return Batch.from_mask(input_ids_BT, torch.from_numpy(block.predicts), position_ids_BT).to(device)


def uses_bfloat16(precision: str, step: torch.nn.Module) -> bool:
    """Whether matrix products are in bfloat16: as set, or as the frozen weights and the device suggest."""
    frozen = next(parameter for parameter in step.parameters() if not parameter.requires_grad)
    if precision != "auto" or frozen.dtype != torch.float32:
        return precision == "bfloat16" or frozen.dtype == torch.bfloat16
    if frozen.device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return has_bfloat16_instructions()


def _agree(wish: bool, place: Place) -> bool:
    """Whether all workers wish it: processors may differ."""
    if place.world_size == 1:
        return wish
    wishes = torch.tensor(int(wish))
    dist.all_reduce(wishes, dist.ReduceOp.MIN)
    return bool(wishes)


def _set_learning_rate(training: Training) -> float:
    settings = training.settings
    factor = compute_learning_rate_factor(len(training.curve), settings.steps, settings.warmup_frac)
    for group in training.optimizer.param_groups:
        group["lr"] = settings.learning_rate * factor
    return settings.learning_rate * factor
