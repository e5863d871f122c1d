"""Checkpoints of a run: what was trained, the optimizer's state, and the curve so far.

Written beside the training (`torch.distributed.checkpoint`, in parts, one per worker) and handed to Ray Train, which
brings them to the run's storage and keeps the last ones. Frozen weights are the teacher's and not in them.
Does not decide when to save. Loading unpickles metadata: whoever can write to the storage can run code on the workers.
Called by: distill/worker.py; distill/loop.py and distill/records.py for the curve's columns.
"""

import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

# Frozen parameters are neither saved nor, so `strict` is off, missed; `load` finds whatever else is not there.
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)

CURVE_COLUMNS = ("loss", "logits_kl", "hidden_loss", "learning_rate", "gradient_norm")


class CheckpointWriter:
    """Saves one checkpoint at a time, in a thread of its own.

    The thread exchanges its metadata over a process group of its own, which training does not use.
    """

    def __init__(self, step: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        """`folder`: on this node, for what is written and not handed over yet; what a run before left goes."""
        self._step, self._optimizer = step, optimizer
        self._base = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._pending: tuple[Future[Any], Path] | None = None

    def start(self, curve: Tensor) -> None:
        """Copy the state as it is now and begin to write it; training may go on at once."""
        assert self._pending is None
        folder = self._base / f"step-{len(curve):08d}"
        state = build_state(self._step, self._optimizer, curve)
        # Parts that are equal everywhere (norms of one part, counters) are written once, by the first worker.
        saved: Any = async_save(state, checkpoint_id=folder, process_group=self._group)
        self._pending = (saved, folder)

    def finish(self) -> Path | None:
        """This worker's part of the checkpoint that was started, when it is written; None if there is none."""
        if self._pending is None:
            return None
        saved, folder = self._pending
        self._pending = None
        saved.result()
        return folder


def build_state(step: nn.Module, optimizer: torch.optim.Optimizer, curve: Tensor) -> dict[str, Any]:
    """What a checkpoint holds. Shapes: curve [steps done, len(CURVE_COLUMNS)]."""
    model, optimizer_state = get_state_dict(step, optimizer, options=_OPTIONS)
    return {
        "student": keep_trained(step, model),
        "optimizer": optimizer_state,
        "curve": curve,
        "steps_done": torch.tensor(len(curve)),
    }


def keep_trained(step: nn.Module, tensors: dict[str, Any]) -> dict[str, Any]:
    """Of a state dict, what is trained.

    torch leaves out frozen parameters by the names of `named_parameters`, which has a tied LM head once, and a state
    dict twice.
    """
    trained = {name for name, parameter in step.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in tensors.items() if name in trained}


def load_checkpoint(step: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Tensor:
    """Put step and optimizer where the checkpoint left them, for any number of workers; returns the curve so far."""
    steps_done = torch.tensor(0)
    load({"steps_done": steps_done}, checkpoint_id=folder)
    state = build_state(step, optimizer, torch.zeros(int(steps_done), len(CURVE_COLUMNS), dtype=torch.float64))
    load(state, checkpoint_id=folder)
    set_state_dict(
        step, optimizer, model_state_dict=state["student"], optim_state_dict=state["optimizer"], options=_OPTIONS
    )
    curve: Tensor = state["curve"]
    return curve
