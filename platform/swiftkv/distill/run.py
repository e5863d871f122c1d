"""A distillation run from recipe to student: rows prepared, workers started by Ray Train, the folder assembled.

Called by: jobs/distill.py.
Calls: distill/prepare.py (rows), distill/worker.py (on the workers), model/ (the student's folder).
"""

import json
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
from ray.train import TrainingFailedError
from safetensors.torch import load_file

from swiftkv.config import home
from swiftkv.distill.folder import (
    CHECKPOINTS,
    DIVERGED_FILE,
    FINAL,
    PROVENANCE_FILE,
    RECIPE_FILE,
    STOP_FILE,
    begin_run,
    check_resumed,
    check_run_folder,
    keep_rows,
    read_run_id,
)
from swiftkv.distill.inputs import check_inputs, check_storage
from swiftkv.distill.loop import Ending
from swiftkv.distill.prepare import prepare_rows
from swiftkv.distill.recipe import Recipe, load_recipe, save_recipe
from swiftkv.distill.records import draw_curve, read_curve
from swiftkv.distill.recovery import recover_checkpoint
from swiftkv.distill.teachers import resolve_teacher
from swiftkv.distill.worker import STUDENT_FILE, train_worker
from swiftkv.errors import DivergedError, SwiftKVError, TrainingError
from swiftkv.model.checkpoint import save_student
from swiftkv.model.convert import convert_teacher
from swiftkv.model.delta import Base
from swiftkv.spec import SwiftKVSpec


def start_run(recipe: Recipe, run_folder: Path) -> Ending:
    """Begin a run in a folder of its own, and see it to its end.

    Needs a Ray cluster to connect to (`ray.init()` decides which).
    Raises: ConfigError if a run was started in the folder before; what `resume_run` raises.
    """
    check_run_folder(run_folder)
    recipe = _resolve(recipe)
    spec = check_inputs(recipe)
    check_storage(recipe.checkpoints.storage or str(run_folder))
    begin_run(run_folder)
    save_recipe(recipe, run_folder / RECIPE_FILE)
    return _run(recipe, spec, run_folder)


def resume_run(run_folder: Path) -> Ending:
    """Go on where a run's last checkpoint left it.

    Raises: ConfigError if there is no run or it has ended; DivergedError if the loss cannot be trusted any more;
    TrainingError if workers died more often than the recipe allows, or checkpoints could not be stored; what the
    recipe's parts raise for bad input.
    """
    check_resumed(run_folder)
    recipe = load_recipe(run_folder / RECIPE_FILE)
    spec = check_inputs(recipe)
    check_storage(recipe.checkpoints.storage or str(run_folder))
    return _run(recipe, spec, run_folder)


def _run(recipe: Recipe, spec: SwiftKVSpec, run_folder: Path) -> Ending:
    rows = prepare_rows(recipe, home() / "rows")
    keep_rows(run_folder, rows.name)
    started = time.monotonic()
    result = _fit(recipe, run_folder, rows)
    ending = Ending(**result.return_value)
    (run_folder / STOP_FILE).unlink(missing_ok=True)  # obeyed, or too late
    if ending.kind == "diverged":
        raise DivergedError(
            f"{run_folder.name}: stopped at step {ending.steps_done + 1}: {ending.problem}. The batch is in "
            f"{run_folder / DIVERGED_FILE}, and the checkpoints before it are kept. Lower "
            "training.learning_rate or look at the batch, and start another run."
        )
    if ending.kind == "finished":
        try:
            _write_provenance(recipe, run_folder, spec, rows, time.monotonic() - started)
            draw_curve(run_folder)
            _write_final(recipe, result.checkpoint, run_folder)
        except OSError as error:
            raise TrainingError(
                f"{run_folder}: all steps are done, but the student cannot be written: {error}. Free some space, then: "
                f"swiftkv distill --resume {run_folder}"
            ) from None
    return ending


def _fit(recipe: Recipe, run_folder: Path, rows: Path) -> Any:
    workers, checkpoints = recipe.workers, recipe.checkpoints
    elastic = workers.min_workers is not None and workers.min_workers < workers.num_workers
    storage = checkpoints.storage or str(run_folder)
    # In a bucket many runs lie side by side, some of the same name.
    name = f"{run_folder.name}-{read_run_id(run_folder)}" if checkpoints.storage else CHECKPOINTS
    trainer = ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "run_folder": str(run_folder),
            "rows": str(rows),
            "recovered": recover_checkpoint(storage, name),
            "job": uuid.uuid4().hex[:12],
        },
        # Checkpoints are gathered on CPUs beside the GPUs' own collectives.
        torch_config=ray.train.torch.TorchConfig(backend="cpu:gloo,cuda:nccl" if workers.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(workers.min_workers, workers.num_workers) if elastic else workers.num_workers,
            use_gpu=workers.use_gpu,
            resources_per_worker={"CPU": workers.cpus_per_worker},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=checkpoints.keep),
            failure_config=ray.train.FailureConfig(max_failures=workers.max_failures),
        ),
    )
    try:
        return trainer.fit()
    except TrainingFailedError as error:
        raise _explain(error, run_folder, storage) from None
    except OSError as error:
        raise TrainingError(f"checkpoints cannot be stored in {storage}: {error}. Check checkpoints.storage.") from None


def _explain(error: TrainingFailedError, run_folder: Path, storage: str) -> SwiftKVError:
    """The failure in one message: our own errors as they are, the rest with what to do."""
    # Of the workers, or of Ray Train's controller, which writes the list of checkpoints.
    causes = list(getattr(error, "worker_failures", {}).values()) or [getattr(error, "controller_failure", error)]
    for cause in causes:
        inner = getattr(cause, "_base_exc", cause)  # Ray wraps what a worker raised
        if isinstance(inner, SwiftKVError):
            return inner
    inner = getattr(causes[0], "_base_exc", causes[0])
    lines = str(inner).strip().splitlines()
    # What crossed processes brings its traceback, whose last line is the reason.
    reason = " ".join([type(inner).__name__, *(lines[-1:] if "Traceback" in str(inner) else lines[:1])])
    return TrainingError(
        f"{run_folder.name}: the run failed: {reason}\nWhat was saved in {storage} is kept. When the reason is gone: "
        f"swiftkv distill --resume {run_folder}"
    )


def _resolve(recipe: Recipe) -> Recipe:
    """Absolute paths, because workers may start in another folder than the job, and a teacher that is here."""
    sources = [
        source.model_copy(update={"files": [file.absolute() for file in source.files]}) for source in recipe.data.train
    ]
    data = recipe.data.model_copy(update={"train": sources})
    return recipe.model_copy(update={"teacher": resolve_teacher(recipe.teacher).absolute(), "data": data})


def _write_final(recipe: Recipe, checkpoint: Any, run_folder: Path) -> None:
    """The student's whole folder; `final` exists only when it is whole."""
    partial = run_folder / f"{FINAL}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with checkpoint.as_directory() as folder:
        tensors = load_file(Path(folder) / STUDENT_FILE)
    cut = recipe.cut
    model = convert_teacher(recipe.teacher, cut.num_key_value_layers, cut.key_value_group_size)
    assert {name for name, _ in model.named_parameters() if "swiftkv" in name} == set(tensors)
    model.load_state_dict(tensors, strict=False)
    try:
        save_student(model, partial, recipe.teacher)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(run_folder / FINAL)
    if not recipe.checkpoints.storage:
        shutil.rmtree(run_folder / CHECKPOINTS, ignore_errors=True)


def _write_provenance(recipe: Recipe, run_folder: Path, spec: SwiftKVSpec, rows: Path, seconds: float) -> None:
    points, base = read_curve(run_folder), Base.from_folder(recipe.teacher)
    provenance = {
        "teacher": {"folder": str(base.folder), "name": base.name, "revision": base.revision},
        "recipe": recipe.model_dump(mode="json"),
        "data": json.loads((rows / "info.json").read_text(encoding="utf-8")),
        "training": {
            "steps": len(points),
            "seconds_since_last_start": round(seconds, 1),
            "first_loss": points[0]["loss"],
            "last_loss": points[-1]["loss"],
            "trained_parameters": spec.count_trained_parameters(),
        },
    }
    (run_folder / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
