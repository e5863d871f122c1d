"""What each Ray Train worker runs: the step is built and divided, the last checkpoint taken up, steps taken.

Does not prepare rows or assemble the student's folder (run.py).
Called by: Ray Train, on behalf of distill/run.py.
Calls: distill/parallel.py, distill/loop.py, distill/checkpoints.py, distill/records.py, distill/utilisation.py.
"""

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
from ray.train import Checkpoint, CheckpointUploadMode
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from swiftkv.distill.checkpoints import CheckpointWriter, keep_trained, load_checkpoint
from swiftkv.distill.data import PackedRows
from swiftkv.distill.folder import DIVERGED_FILE, STOP_FILE, note_start, read_run_id
from swiftkv.distill.loop import Ending, Figures, Place, Training, train
from swiftkv.distill.parallel import shard_step
from swiftkv.distill.recipe import Recipe
from swiftkv.distill.records import RunRecorder
from swiftkv.distill.recovery import open_storage
from swiftkv.distill.step import DistillStep
from swiftkv.distill.utilisation import find_peak_flops_per_s
from swiftkv.errors import TrainingError
from swiftkv.model.convert import convert_teacher, freeze_teacher

STUDENT_FILE = "student.safetensors"
"""In the last checkpoint: the tensors that distillation made, in the dtype of the teacher's."""


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Runs the recipe to its end, or to where it is stopped; returns the `Ending` as a dict."""
    recipe, run_folder = Recipe.model_validate(settings["recipe"]), Path(settings["run_folder"])
    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size())
    num_restarts = note_start(run_folder, settings["job"]) if place.rank == 0 else 0
    step = build_step(recipe)
    shard_step(step, ray.train.torch.get_device(), place.world_size)
    training = Training(step, recipe, _open_rows(Path(settings["rows"])), place)
    checkpoint = ray.train.get_checkpoint() or _open_recovered(recipe, run_folder, settings["recovered"])
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            if (Path(folder) / STUDENT_FILE).exists():  # ended already, and the driver died before it was told
                return asdict(Ending("finished", recipe.training.steps))
            training.curve = load_checkpoint(step, training.optimizer, Path(folder))
    scratch = Path(tempfile.gettempdir()) / f"swiftkv-{read_run_id(run_folder)}-{place.rank}"
    worker = _Worker(training, recipe, run_folder, scratch, num_restarts)
    try:
        ending = train(training, recipe.checkpoints.every_steps, worker)
    finally:
        worker.close()
    if ending.kind == "diverged" and place.rank == 0:
        _save_batch(training, run_folder)
    if ending.kind == "finished":
        _report_student(step, place.rank, training.curve, scratch)
    return asdict(ending)


def _open_recovered(recipe: Recipe, run_folder: Path, path: str | None) -> Checkpoint | None:
    """The checkpoint that a run goes on from whose list of them was lost."""
    if path is None:
        return None
    system, _ = open_storage(recipe.checkpoints.storage or str(run_folder))
    return Checkpoint(path, filesystem=system)


def _open_rows(folder: Path) -> PackedRows:
    if not folder.is_dir():
        raise TrainingError(f"{folder}: not on this node. SWIFTKV_HOME must lie on storage that all nodes see.")
    return PackedRows.open(folder)


def build_step(recipe: Recipe) -> DistillStep:
    """The recipe's teacher with an untrained student in it, frozen but for the student's projections."""
    cut, settings = recipe.cut, recipe.training
    model = convert_teacher(recipe.teacher, cut.num_key_value_layers, cut.key_value_group_size)
    freeze_teacher(model)
    for layer in model.model.later_layers:
        layer.checkpoints_activations = settings.activation_checkpointing
    return DistillStep(model, settings.temperature, settings.hidden_loss_weight, settings.teacher_rows)


class _Worker:
    """The surroundings of the loop in a Ray Train worker."""

    def __init__(self, training: Training, recipe: Recipe, run_folder: Path, scratch: Path, num_restarts: int) -> None:
        self._is_first = training.place.rank == 0
        self._recorder: RunRecorder | None = None
        if self._is_first:
            peak = find_peak_flops_per_s(training.trained[0].device, training.bfloat16)
            all_peaks = None if peak is None else peak * training.place.world_size
            self._recorder = RunRecorder(recipe, run_folder, training.curve, num_restarts, all_peaks)
        self._writer = CheckpointWriter(training.step, training.optimizer, scratch)
        self._stop_file = run_folder / STOP_FILE
        self._steps_saved = 0
        self._waited_s = 0.0
        """For the checkpoint that was begun."""

    def log(self, figures: Figures) -> None:
        """Record the step."""
        if self._recorder is not None:
            self._recorder.record(figures)

    def save(self, curve: Tensor) -> None:
        """Begin to write this worker's part of a checkpoint."""
        started = time.monotonic()
        self._steps_saved = len(curve)
        self._writer.start(curve)
        self._waited_s = time.monotonic() - started

    def hand_over(self) -> None:
        """Give Ray Train the part that was begun; it is uploaded while training goes on."""
        started = time.monotonic()
        folder = self._writer.finish()
        if folder is None:
            return
        _report(folder, {"step": self._steps_saved}, f"step-{self._steps_saved:08d}")
        if self._recorder is not None:
            self._recorder.record_checkpoint(self._waited_s + time.monotonic() - started)

    def wants_to_stop(self) -> bool:
        """Whether somebody asked the run to end."""
        return self._is_first and self._stop_file.exists()

    def close(self) -> None:
        """Write what the recorder still holds back."""
        if self._recorder is not None:
            self._recorder.close()


def _report_student(step: DistillStep, rank: int, curve: Tensor, scratch: Path) -> None:
    """The run's last checkpoint: the student whole, from the first worker."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    tensors = keep_trained(step, get_model_state_dict(step, options=options))
    metrics = {"step": len(curve)}
    if rank != 0:
        ray.train.report(metrics)
        return
    frozen = step.model.model.embed_tokens.weight.dtype
    student = {name.removeprefix("model."): part.to(frozen).contiguous() for name, part in tensors.items()}
    folder = scratch / "student"
    folder.mkdir()
    save_file(student, folder / STUDENT_FILE)
    _report(folder, metrics, "student", CheckpointUploadMode.SYNC)


def _report(
    folder: Path, metrics: dict[str, Any], name: str, mode: CheckpointUploadMode = CheckpointUploadMode.ASYNC
) -> None:
    ray.train.report(
        metrics,
        checkpoint=Checkpoint.from_directory(folder),
        checkpoint_dir_name=name,
        checkpoint_upload_mode=mode,
        delete_local_checkpoint_after_upload=True,
    )


def _save_batch(training: Training, run_folder: Path) -> None:
    """The rows of the step that diverged, for whoever looks for the reason."""
    chosen = training.choose_rows()
    block = training.rows.read(chosen)
    arrays = {name: getattr(block, name) for name in ("input_ids", "position_ids", "predicts")}
    np.savez_compressed(run_folder / DIVERGED_FILE, rows=chosen, **arrays)
