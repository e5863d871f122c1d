"""What a run leaves for people to look at: log lines, curve.jsonl, TensorBoard files, W&B, metrics, a picture.

Does not measure anything but time and memory. Only the first worker records.
Called by: distill/worker.py (while it runs), distill/run.py (the picture).
"""

import json
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from swiftkv.distill.checkpoints import CURVE_COLUMNS
from swiftkv.distill.folder import CURVE_FILE, read_run_id
from swiftkv.distill.loop import Figures
from swiftkv.distill.progress import Progress
from swiftkv.distill.recipe import Recipe
from swiftkv.metrics import observe, record

_GIB = 2**30


class RunRecorder:
    """Records each step, and says how far the run is every few steps."""

    def __init__(
        self,
        recipe: Recipe,
        run_folder: Path,
        curve: Tensor,
        num_restarts: int = 0,
        peak_flops_per_s: float | None = None,
    ) -> None:
        """`curve`: of the steps that were done before; what was recorded after them is forgotten.

        `num_restarts`: of the run's workers so far. `peak_flops_per_s`: of all workers; None where it is not known.
        """
        self._num_restarts, self._peak_flops_per_s = num_restarts, peak_flops_per_s
        self._recipe, self._run = recipe, run_folder.name
        self._window = _Window(recipe)
        run_folder.mkdir(parents=True, exist_ok=True)
        self._file = (run_folder / CURVE_FILE).open("w", encoding="utf-8", buffering=1)
        for step, row in enumerate(curve.tolist(), start=1):
            self._file.write(_format_point(step, row))
        self._tensorboard = _open_tensorboard(run_folder, len(curve)) if recipe.report.tensorboard else None
        self._wandb = _open_wandb(recipe, run_folder) if recipe.report.wandb_project else None

    def record(self, figures: Figures) -> None:
        """Note a step; print a line where one is due."""
        point = {column: getattr(figures, column) for column in CURVE_COLUMNS}
        self._file.write(_format_point(figures.step, list(point.values())))
        if self._tensorboard is not None:
            for column, value in point.items():
                self._tensorboard.add_scalar(f"distill/{column}", value, figures.step)
        if self._wandb is not None:
            self._wandb.log(point, step=figures.step)
        progress = self._window.add(figures)
        if progress is not None:
            print(progress.format_line(), flush=True)
            self._record_metrics(progress)

    def record_checkpoint(self, waited_s: float) -> None:
        """Note what training waited for a checkpoint."""
        observe("swiftkv_distill_checkpoint_seconds", waited_s, run=self._run)

    def close(self) -> None:
        """Write what is still held back."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _record_metrics(self, progress: Progress) -> None:
        run = self._run
        record("swiftkv_distill_step", progress.step, run=run)
        for part in ("loss", "logits_kl", "hidden_loss"):
            record("swiftkv_distill_loss_nats", getattr(progress, part), run=run, part=part)
        record("swiftkv_distill_tokens_per_second", progress.tokens_per_s, run=run)
        record("swiftkv_distill_learning_rate", progress.learning_rate, run=run)
        record("swiftkv_distill_gradient_norm", progress.gradient_norm, run=run)
        record("swiftkv_distill_memory_bytes", progress.memory_gib * _GIB, run=run)
        record("swiftkv_distill_remaining_seconds", progress.remaining_s, run=run)
        record("swiftkv_distill_flops_per_second", progress.flops_per_s, run=run)
        if self._peak_flops_per_s is not None:
            record("swiftkv_distill_flop_utilisation_frac", progress.flops_per_s / self._peak_flops_per_s, run=run)
        record("swiftkv_distill_restarts", self._num_restarts, run=run)


class _Window:
    """Means of the figures since the last line of progress."""

    def __init__(self, recipe: Recipe) -> None:
        settings = recipe.training
        self._steps, self._every = settings.steps, settings.log_every_steps
        self._tokens_per_step = settings.rows_per_step * recipe.data.row_tokens
        self._figures: list[Figures] = []
        self._since = time.monotonic()

    def add(self, figures: Figures) -> Progress | None:
        """The progress at this step if it is time for a line."""
        self._figures.append(figures)
        if figures.step % self._every and figures.step != self._steps and not figures.asked_to_stop:
            return None
        count, now = len(self._figures), time.monotonic()
        seconds = now - self._since
        step_s = seconds / count
        names = ("loss", "logits_kl", "hidden_loss", "gradient_norm")
        means = {name: sum(getattr(entry, name) for entry in self._figures) / count for name in names}
        flops_per_s = sum(entry.flops for entry in self._figures) / seconds
        self._figures, self._since = [], now
        return Progress(
            figures.step,
            self._steps,
            **means,
            learning_rate=figures.learning_rate,
            tokens_per_s=self._tokens_per_step / step_s,
            flops_per_s=flops_per_s,
            memory_gib=_measure_memory_bytes() / _GIB,
            remaining_s=step_s * (self._steps - figures.step),
        )


def read_curve(run_folder: Path) -> list[dict[str, float]]:
    """The points of a run's curve, one per step."""
    lines = (run_folder / CURVE_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def draw_curve(run_folder: Path) -> Path:
    """A picture of loss, its parts, learning rate and gradient norm over the steps, in the run's folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = read_curve(run_folder)
    steps = [point["step"] for point in points]
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(2, 1))
    for column, label in (("loss", "loss"), ("logits_kl", "KL of the logits"), ("hidden_loss", "hidden states")):
        top.plot(steps, [point[column] for point in points], label=label, linewidth=1)
    top.set(ylabel="loss per position (KL in nats x temperature²)", yscale="log", title=run_folder.name)
    bottom.plot(steps, [point["learning_rate"] for point in points], color="tab:gray", label="learning rate")
    bottom.set(xlabel="optimizer step", ylabel="learning rate")
    norms = bottom.twinx()
    norms.plot(steps, [point["gradient_norm"] for point in points], color="tab:red", linewidth=0.6)
    norms.set_ylabel("gradient norm", color="tab:red")
    top.legend()
    path = run_folder / "curve.png"
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return path


def _format_point(step: int, row: list[float]) -> str:
    return json.dumps({"step": step, **dict(zip(CURVE_COLUMNS, row, strict=True))}) + "\n"


def _measure_memory_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return int(psutil.Process().memory_info().rss)


def _open_tensorboard(run_folder: Path, steps_done: int) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(run_folder / "tensorboard"), purge_step=steps_done + 1 if steps_done else None)


def _open_wandb(recipe: Recipe, run_folder: Path) -> Any:
    import wandb

    name = run_folder.name
    return wandb.init(
        project=recipe.report.wandb_project,
        name=name,
        id=f"{name}-{read_run_id(run_folder)}",
        resume="allow",
        dir=str(run_folder),
        config=recipe.model_dump(mode="json"),
    )
