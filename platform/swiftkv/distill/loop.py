"""A distillation run: rows prepared, workers started by Ray Train, steps taken, the student saved.

Called by: jobs/distill.py.
Calls: text.py (rows), distill/data.py (which rows), model/convert.py (teacher to student), distill/step.py (one batch).

Shapes: B rows of this worker, T tokens.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch

from swiftkv.distill.data import choose_rows
from swiftkv.distill.inputs import check_inputs, check_run_folder
from swiftkv.distill.losses import compute_learning_rate_factor
from swiftkv.distill.progress import Progress
from swiftkv.distill.recipe import Recipe, save_recipe
from swiftkv.distill.step import Batch, DistillStep
from swiftkv.metrics import record
from swiftkv.model.checkpoint import load_tokenizer, save_student
from swiftkv.model.convert import convert_teacher, freeze_teacher
from swiftkv.model.modeling import SwiftKVForCausalLM
from swiftkv.spec import SwiftKVSpec
from swiftkv.text import Rows, build_rows

OnLog = Callable[[Progress], None]


def run_distillation(recipe: Recipe, run_folder: Path) -> Path:
    """Distill and leave the student in `<run_folder>/final`; also recipe.yaml, progress.jsonl, provenance.json.

    Needs a Ray cluster to connect to (`ray.init()` decides which).
    Raises: ConfigError if the folder holds a finished run; what the recipe's parts raise for bad input.
    """
    final = run_folder / "final"
    check_run_folder(run_folder)
    recipe = _make_absolute(recipe)
    spec = check_inputs(recipe)
    run_folder.mkdir(parents=True, exist_ok=True)
    # A run that was killed: Ray Train would take up its checkpoints, which belong to another start.
    shutil.rmtree(run_folder / "ray", ignore_errors=True)
    save_recipe(recipe, run_folder / "recipe.yaml")
    rows = _prepare_rows(recipe, run_folder / "rows.npy")
    print(
        f"distill {recipe.teacher}: {spec.num_key_value_layers} of {spec.shape.num_hidden_layers} layers run for "
        f"every token, groups of {spec.key_value_group_size}, {len(rows)} rows of {recipe.data.row_tokens} tokens",
        flush=True,
    )
    started = time.monotonic()
    trainer = ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={"recipe": recipe.model_dump(mode="json"), "run_folder": str(run_folder)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=recipe.workers.num_workers,
            use_gpu=recipe.workers.use_gpu,
            resources_per_worker={"CPU": recipe.workers.cpus_per_worker},
        ),
        run_config=ray.train.RunConfig(name="train", storage_path=str(run_folder.absolute() / "ray")),
    )
    result = trainer.fit()
    assert result.checkpoint is not None, "the last step reports a checkpoint"
    _write_provenance(recipe, run_folder, spec, time.monotonic() - started)
    _keep_final(result.checkpoint, final)
    shutil.rmtree(run_folder / "ray")
    (run_folder / "rows.npy").unlink()
    return final


def train_worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs; the first one reports and saves."""
    recipe = Recipe.model_validate(settings["recipe"])
    run_folder = Path(settings["run_folder"])
    context = ray.train.get_context()
    model = build_student(recipe)
    step = ray.train.torch.prepare_model(
        DistillStep(model, recipe.training.temperature, recipe.training.hidden_loss_weight)
    )
    rows = np.load(run_folder / "rows.npy", mmap_mode="r")
    rank = context.get_world_rank()
    train(step, rows, recipe, rank, context.get_world_size(), _build_log(run_folder) if rank == 0 else _ignore)
    if rank != 0:
        ray.train.report({})
        return
    with tempfile.TemporaryDirectory(dir=run_folder) as folder:
        save_student(model, Path(folder), recipe.teacher)
        ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def build_student(recipe: Recipe) -> SwiftKVForCausalLM:
    """The recipe's teacher with an untrained student in it, frozen but for the student's projections."""
    cut = recipe.cut
    model = convert_teacher(recipe.teacher, cut.num_key_value_layers, cut.key_value_group_size)
    freeze_teacher(model)
    return model


def train(step: torch.nn.Module, rows: Rows, recipe: Recipe, rank: int, world_size: int, on_log: OnLog) -> None:
    """Take all optimizer steps of the recipe on this worker's share of each step's rows."""
    settings = recipe.training
    trained = [parameter for parameter in step.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: compute_learning_rate_factor(done, settings.steps, settings.warmup_frac)
    )
    window = _LogWindow(settings.steps, settings.rows_per_step * rows.shape[1], settings.log_every_steps)
    for done in range(settings.steps):
        chosen = choose_rows(done, settings.rows_per_step, len(rows), settings.seed)[rank::world_size]
        input_ids_BT = torch.from_numpy(rows[chosen].astype(np.int64)).to(trained[0].device)
        losses = _take_step(step, input_ids_BT, optimizer, trained, recipe)
        progress = window.add(done + 1, losses, float(schedule.get_last_lr()[0]))
        schedule.step()
        if progress is not None:
            on_log(progress)


def _take_step(
    step: torch.nn.Module,
    input_ids_BT: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    trained: list[torch.nn.Parameter],
    recipe: Recipe,
) -> dict[str, float]:
    bfloat16 = uses_bfloat16(recipe.training.precision, step)
    with torch.autocast(input_ids_BT.device.type, torch.bfloat16, enabled=bfloat16):
        # Rows are full, so every worker has as many positions, and the mean of their gradients is the batch's.
        losses = step(Batch(input_ids_BT), num_positions=input_ids_BT.numel())
    optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    torch.nn.utils.clip_grad_norm_(trained, recipe.training.max_gradient_norm)
    optimizer.step()
    return {name: float(loss.detach()) for name, loss in losses.items()}


def uses_bfloat16(precision: str, step: torch.nn.Module) -> bool:
    """Whether matrix products are in bfloat16: as set, or as the frozen weights and the device suggest."""
    frozen = next(parameter for parameter in step.parameters() if not parameter.requires_grad)
    if precision != "auto" or frozen.dtype != torch.float32:
        return precision == "bfloat16" or frozen.dtype == torch.bfloat16
    if frozen.device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    processor = torch.cpu.get_capabilities()
    return bool(processor.get("avx512_bf16") or processor.get("amx_bf16"))


class _LogWindow:
    """Means of the losses since the last line of progress."""

    def __init__(self, steps: int, tokens_per_step: int, log_every_steps: int) -> None:
        self._steps, self._tokens_per_step, self._every = steps, tokens_per_step, log_every_steps
        self._losses: list[dict[str, float]] = []
        self._since = time.monotonic()

    def add(self, step: int, losses: dict[str, float], learning_rate: float) -> Progress | None:
        """The progress at this step if it is time for a line."""
        self._losses.append(losses)
        if step % self._every and step != self._steps:
            return None
        count, now = len(self._losses), time.monotonic()
        means = {name: sum(entry[name] for entry in self._losses) / count for name in losses}
        tokens_per_s = count * self._tokens_per_step / (now - self._since)
        self._losses, self._since = [], now
        return Progress(step, self._steps, **means, learning_rate=learning_rate, tokens_per_s=tokens_per_s)


def _build_log(run_folder: Path) -> OnLog:
    """Progress to the job's log, to progress.jsonl and to the metrics."""
    run = run_folder.name
    file = (run_folder / "progress.jsonl").open("w", encoding="utf-8", buffering=1)

    def log(progress: Progress) -> None:
        print(progress.format_line(), flush=True)
        file.write(json.dumps(vars(progress)) + "\n")
        record("swiftkv_distill_step", progress.step, run=run)
        for part in ("loss", "logits_kl", "hidden_loss"):
            record("swiftkv_distill_loss_nats", getattr(progress, part), run=run, part=part)
        record("swiftkv_distill_tokens_per_second", progress.tokens_per_s, run=run)

    return log


def _ignore(_: Progress) -> None:
    """Workers other than the first say nothing."""


def _make_absolute(recipe: Recipe) -> Recipe:
    """Workers may start in another folder than the job."""
    data = recipe.data.model_copy(update={"train": [file.absolute() for file in recipe.data.train]})
    return recipe.model_copy(update={"teacher": recipe.teacher.absolute(), "data": data})


def _prepare_rows(recipe: Recipe, path: Path) -> Rows:
    tokenizer = load_tokenizer(recipe.teacher)
    rows = build_rows(tokenizer, recipe.data.train, recipe.data.text_column, recipe.data.row_tokens)
    np.save(path, rows)
    return rows


def _keep_final(checkpoint: ray.train.Checkpoint, final: Path) -> None:
    """Copy beside the target first: `final` exists only when it is whole."""
    partial = final.with_name("final.partial")
    shutil.rmtree(partial, ignore_errors=True)
    checkpoint.to_directory(str(partial))
    partial.rename(final)


def _write_provenance(recipe: Recipe, run_folder: Path, spec: SwiftKVSpec, seconds: float) -> None:
    lines = (run_folder / "progress.jsonl").read_text(encoding="utf-8").splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    provenance = {
        "teacher": {"folder": str(recipe.teacher.absolute())},
        "recipe": recipe.model_dump(mode="json"),
        "training": {
            "steps": last["steps"],
            "seconds": round(seconds, 1),
            "first_loss": first["loss"],
            "last_loss": last["loss"],
            "tokens_per_s": last["tokens_per_s"],
            "trained_parameters": spec.count_trained_parameters(),
        },
    }
    (run_folder / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
