"""A distillation recipe: every setting of one run, as YAML. Imports nothing heavy and touches no data.

Called by: jobs/distill.py, cli/distill.py.
"""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from swiftkv.config import StrictModel, load_yaml, parse_settings, parse_yaml, read_yaml
from swiftkv.errors import ConfigError


class CutSettings(StrictModel):
    """Which layers a prompt token skips."""

    num_key_value_layers: int | None = Field(default=None, ge=1)
    """First layers that run for every token; None keeps half of them (the safe choice for Llama)."""
    key_value_group_size: int = Field(default=1, ge=1)
    """Neighbouring later layers that share one KV cache; 1 shares nothing."""


class DataSettings(StrictModel):
    """The text to distill on."""

    train: list[Path] = Field(min_length=1)
    """JSONL files. Relative paths start where the job starts."""
    text_column: str = "text"
    """Key of the text in each JSONL record."""
    row_tokens: int = Field(default=512, ge=16)
    """Tokens per row. Documents are packed into rows one after the other, with the end token between them."""


class TrainingSettings(StrictModel):
    """How the student's projections are trained."""

    steps: int = Field(ge=1)
    """Optimizer steps."""
    rows_per_step: int = Field(default=8, ge=1)
    """Rows per optimizer step over all workers."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak of the schedule: linear warm-up, then linear decay to zero. The default is the published recipes'."""
    warmup_frac: float = Field(default=0.05, ge=0, le=1)
    """Part of the steps spent warming up."""
    max_gradient_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    temperature: float = Field(default=2.0, gt=0)
    """Softens both distributions in the logits loss."""
    hidden_loss_weight: float = Field(default=1.0, ge=0)
    """Weight of the mean squared error of the second-to-last layer's output; 0 leaves it out."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products (autocast); trained weights and optimizer state are float32. auto: bfloat16 where the
    device multiplies it itself, which is about twice as fast. A teacher in bfloat16 is always multiplied so."""
    seed: int = 0
    """Of the order of rows."""
    log_every_steps: int = Field(default=5, ge=1)
    """Steps between two lines of progress."""


class WorkerSettings(StrictModel):
    """What the Ray cluster must give."""

    num_workers: int = Field(default=2, ge=1)
    """Ray Train workers; rows_per_step is divided over them."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPU cores of each worker."""
    use_gpu: bool = False
    """One GPU per worker."""


class Recipe(StrictModel):
    """Everything that defines a run; saved beside its result."""

    teacher: Path
    """Hugging Face folder of the teacher."""
    cut: CutSettings = CutSettings()
    data: DataSettings
    training: TrainingSettings
    workers: WorkerSettings = WorkerSettings()

    @model_validator(mode="after")
    def _divide_rows(self) -> "Recipe":
        rows, workers = self.training.rows_per_step, self.workers.num_workers
        if rows % workers:
            raise ValueError(
                f"workers.num_workers is {workers}, which does not divide training.rows_per_step ({rows}): "
                "change one of them"
            )
        return self


def load_recipe(path: Path, overrides: dict[str, str] | None = None) -> Recipe:
    """The recipe at `path`, with values of dotted keys replaced, such as {"training.steps": "20"}.

    Raises: ConfigError naming the wrong key or value and what is allowed.
    """
    if not overrides:
        return load_yaml(path, Recipe)
    values = read_yaml(path)
    for dotted, text in overrides.items():
        _set_dotted(values, dotted, parse_yaml(text, f"--set {dotted}={text}"))
    return parse_settings(values, Recipe, f"{path} with {', '.join(f'{k}={v}' for k, v in overrides.items())}")


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, which `load_recipe` reads back unchanged."""
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def parse_overrides(assignments: list[str]) -> dict[str, str]:
    """`["training.steps=20"]` as a dict.

    Raises: ConfigError for an assignment without `=`.
    """
    overrides = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {assignment}: expected KEY=VALUE, such as training.steps=20.")
        overrides[key] = value
    return overrides


def _set_dotted(values: Any, dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        if not isinstance(values, dict) or not isinstance(values.setdefault(parent, {}), dict):
            raise ConfigError(f"--set {dotted}: {parent} is not a section of the recipe.")
        values = values[parent]
    if not isinstance(values, dict):
        raise ConfigError(f"--set {dotted}: the recipe is not a mapping.")
    values[last] = value
