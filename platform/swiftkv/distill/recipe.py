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


class SourceSettings(StrictModel):
    """Documents of one kind: a data set of the Hugging Face hub, or files."""

    name: str | None = None
    """Data set on the hub, such as HuggingFaceH4/ultrachat_200k; give this or `files`."""
    subset: str | None = None
    """The hub data set's configuration, where it has several."""
    split: str = "train"
    """The hub data set's split; slices such as train[:1%] work."""
    files: list[Path] = Field(default=[])
    """JSON lines, Parquet, or plain text (one document per file), by the end of their names. Relative paths start
    where the job starts."""
    format: Literal["text", "chat", "pair"] = "text"
    """text: documents, with loss everywhere. chat: messages, through the tokenizer's chat template. pair: a prompt and
    its response, one directly after the other. Of chat and pair the answers carry the loss."""
    text_column: str = "text"
    """Of the format text."""
    messages_column: str = "messages"
    """Of the format chat: a list of messages, each with `role` and `content` (or `from` and `value`)."""
    prompt_column: str = "prompt"
    """Of the format pair."""
    response_column: str = "response"
    """Of the format pair."""
    max_documents: int | None = Field(default=None, ge=1)
    """The first so many documents; None takes all."""

    @model_validator(mode="after")
    def _choose_one(self) -> "SourceSettings":
        if (self.name is None) == (not self.files):
            raise ValueError("give `name` (a data set of the hub) or `files`, and not both")
        return self


class DataSettings(StrictModel):
    """The text to distill on."""

    train: list[SourceSettings] = Field(min_length=1)
    """Where documents come from; all of them, mixed."""
    row_tokens: int = Field(default=512, ge=16)
    """Tokens per row."""
    packing: bool = True
    """Several documents per row, none of which sees another; False puts one in each row and fills up."""
    loss_on: Literal["answers", "all"] = "answers"
    """Of the formats chat and pair: the answers alone, or every position."""


class TrainingSettings(StrictModel):
    """How the student's projections are trained."""

    steps: int = Field(ge=1)
    """Optimizer steps."""
    rows_per_step: int = Field(default=8, ge=1)
    """Rows per optimizer step over all workers."""
    rows_per_pass: int | None = Field(default=None, ge=1)
    """Rows of one forward and backward pass of a worker, whose gradients are summed over the passes of a step; None
    takes all rows of the worker at once."""
    teacher_rows: int | None = Field(default=None, ge=1)
    """Rows of a pass that first half and teacher, which take no gradient, run at a time, to save memory; None runs
    all."""
    activation_checkpointing: bool = False
    """Compute the student's later layers again in the backward pass instead of keeping their activations."""
    learning_rate: float = Field(default=2e-4, gt=0, le=1)
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
    spike_factor: float | None = Field(default=10.0, gt=1)
    """A loss of more than so many times the mean of the last 20 steps stops the run, as a loss that is not a number
    always does; None never."""


class CheckpointSettings(StrictModel):
    """What a run that was interrupted goes on from."""

    every_steps: int = Field(default=100, ge=1)
    """Optimizer steps between two checkpoints: the most that is lost, but for the step and the upload that go on
    beside a checkpoint."""
    keep: int = Field(default=2, ge=1)
    """How many of the last checkpoints stay."""
    storage: str | None = None
    """Folder or bucket (s3://..., gs://...) that every node can reach and only trusted people can write to; None takes
    the run's folder."""


class WorkerSettings(StrictModel):
    """What the Ray cluster must give."""

    num_workers: int = Field(default=2, ge=1)
    """Ray Train workers, over which the weights and each step's rows are divided."""
    min_workers: int | None = Field(default=None, ge=1)
    """A run that lost a node goes on with as few as these; None waits until num_workers are there again."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPU cores of each worker."""
    use_gpu: bool = False
    """One GPU per worker."""
    max_failures: int = Field(default=3, ge=-1)
    """Times that the run starts again from its last checkpoint after a worker died; -1 does not count."""

    @model_validator(mode="after")
    def _order(self) -> "WorkerSettings":
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers is {self.min_workers}, more than num_workers ({self.num_workers}); lower it or raise the "
                "other"
            )
        return self


class ReportSettings(StrictModel):
    """Where a run shows its figures, beside its folder, the terminal and Prometheus."""

    tensorboard: bool = True
    """Event files in the run's folder."""
    wandb_project: str | None = None
    """Project of Weights & Biases; None sends nothing. Needs `pip install wandb` and its login."""


class Recipe(StrictModel):
    """Everything that defines a run; saved beside its result."""

    teacher: Path
    """Hugging Face folder of the teacher, or its name on the hub, such as meta-llama/Llama-3.1-8B-Instruct."""
    cut: CutSettings = CutSettings()
    data: DataSettings
    training: TrainingSettings
    checkpoints: CheckpointSettings = CheckpointSettings()
    workers: WorkerSettings = WorkerSettings()
    report: ReportSettings = ReportSettings()


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
