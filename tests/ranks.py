"""Training runs of several processes for the tests: functions that spawned processes can import.

Called by: tests of distill/.
"""

import os
import socket
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.tensor import DTensor

from swiftkv.distill.checkpoints import CheckpointWriter, load_checkpoint
from swiftkv.distill.data import PackedRows
from swiftkv.distill.loop import Figures, Place, Training, train
from swiftkv.distill.parallel import shard_step
from swiftkv.distill.recipe import Recipe
from swiftkv.distill.worker import build_step

STEPS = 6


class Notes:
    """Surroundings that write everything down, and save to folders of their own."""

    def __init__(self, training: Training, folder: Path, stop_after: int | None = None) -> None:
        self.figures: list[Figures] = []
        self.saved: list[Path] = []
        scratch = folder / f"scratch-{training.place.rank}"
        self._writer = CheckpointWriter(training.step, training.optimizer, scratch)
        self._folder, self._stop_after = folder, stop_after

    def log(self, figures: Figures) -> None:
        self.figures.append(figures)

    def save(self, curve: torch.Tensor) -> None:
        self._steps = len(curve)
        self._writer.start(curve)

    def hand_over(self) -> None:
        part = self._writer.finish()
        if part is not None:  # as Ray Train does: the workers' parts become one folder
            target = self._folder / f"step-{self._steps}"
            target.mkdir(exist_ok=True)
            for file in part.iterdir():
                file.rename(target / file.name)
            self.saved.append(target)

    def wants_to_stop(self) -> bool:
        return self._stop_after is not None and len(self.figures) + 1 >= self._stop_after


def build_recipe(teacher: Path, **training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "teacher": str(teacher),
            "cut": {"num_key_value_layers": 2, "key_value_group_size": 2},
            "data": {"train": [{"files": ["unused.jsonl"]}], "row_tokens": 32},
            "training": {"steps": STEPS, "rows_per_step": 6, "learning_rate": 5e-3, "precision": "float32"} | training,
        }
    )


def build_rows() -> PackedRows:
    """Rows of two documents each, with a loss at random positions; row 3 has none."""
    generator = np.random.default_rng(0)
    input_ids = generator.integers(0, 256, (9, 32), dtype=np.int32)
    position_ids = np.tile(np.concatenate([np.arange(20), np.arange(12)]).astype(np.int32), (9, 1))
    predicts = generator.random((9, 32)) < 0.4
    predicts[3] = False
    return PackedRows(input_ids, position_ids, predicts, predicts.sum(1), used_frac=1.0)


def run(
    recipe: Recipe,
    place: Place,
    folder: Path,
    checkpoint: Path | None = None,
    stop_after: int | None = None,
    rows: PackedRows | None = None,
) -> dict[str, Any]:
    """All steps of a recipe in this process, alone or as one of a group."""
    torch.set_num_threads(1)
    step = build_step(recipe)
    if dist.is_initialized():
        shard_step(step, torch.device("cpu"), place.world_size)
    training = Training(step, recipe, rows or build_rows(), place)
    if checkpoint is not None:
        training.curve = load_checkpoint(step, training.optimizer, checkpoint)
    notes = Notes(training, folder, stop_after)
    ending = train(training, 2, notes)
    weights = {name: _gather(part).detach() for name, part in step.named_parameters() if part.requires_grad}
    moments = [entry[name] for entry in training.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return {
        "num_kept": {"weights": _count_kept(step.parameters()), "moments": _count_kept(moments)},
        "ending": ending,
        "curve": training.curve,
        "weights": weights,
        "figures": notes.figures,
        "saved": notes.saved,
    }


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _count_kept(tensors: Iterable[torch.Tensor]) -> int:
    """Numbers that this process holds of the tensors."""
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel() for tensor in tensors)


class Ranks:
    """Processes of one gloo group that train what they are given, one run after the other."""

    def __init__(self, world_size: int) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self._orders = [context.SimpleQueue() for _ in range(world_size)]
        self._answers = context.SimpleQueue()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._processes = [
            context.Process(target=_obey, args=(rank, world_size, port, orders, self._answers), daemon=True)
            for rank, orders in enumerate(self._orders)
        ]
        for process in self._processes:
            process.start()

    def run(self, recipe: Recipe, folder: Path, checkpoint: Path | None = None, stop_after: int | None = None) -> Any:
        """What `run` gives on the first rank."""
        folder.mkdir(exist_ok=True)
        for orders in self._orders:
            orders.put((recipe, folder, checkpoint, stop_after))
        kind, answer = self._answers.get()
        assert kind == "result", answer
        return answer

    def close(self) -> None:
        """End the processes."""
        for orders, process in zip(self._orders, self._processes, strict=True):
            orders.put(None)
            process.join(20)
            process.kill()


def _obey(rank: int, world_size: int, port: int, orders: Any, answers: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    while (order := orders.get()) is not None:
        recipe, *others = order
        try:
            result = run(recipe, Place(rank, world_size), *others)
        except BaseException:
            answers.put(("error", traceback.format_exc()))
            raise
        dist.barrier()  # every part of the last checkpoint is in its folder
        if rank == 0:
            answers.put(("result", result))
    dist.destroy_process_group()
