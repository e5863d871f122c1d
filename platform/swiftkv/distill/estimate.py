"""What a run would take, from the recipe and the spec alone: parameters, memory per worker, FLOPs, tokens/s, hours.

Arithmetic with assumptions that are named where they stand; reads no weights, measures nothing, imports no torch.
Communication between workers and input are taken to cost no time.
Called by: cli/distill.py (--dry-run), distill/utilisation.py. Calls: distill/costs.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from swiftkv.distill.costs import Workload, compute_memory_parts, compute_step_flops, count_teacher_parameters
from swiftkv.distill.recipe import Recipe
from swiftkv.errors import ConfigError
from swiftkv.spec import SwiftKVSpec

ASSUMED_ANSWER_FRAC = 0.75
"""Positions of a row of chats that carry loss: a guess on the high side for general chats. Where prompts are ten times
longer than answers it is a tenth, and the run is that much faster and smaller."""
USABLE_FRAC = 0.9
"""Of a device's memory; the rest is left to the CUDA context, the communication and gaps between tensors."""
_SHORTEST_ROW = 128


@dataclass(frozen=True)
class Device:
    """What one worker computes on. Peaks are of dense bfloat16 products, as the maker documents them."""

    memory_bytes: float
    peak_flops_per_s: float
    utilisation_frac: float = 0.4
    """Part of the peak that a training step is assumed to reach."""
    is_gpu: bool = True
    names: tuple[str, ...] = ()
    """What the driver calls such devices."""


DEVICES = {
    "h100-80gb": Device(80e9, 989e12, names=("NVIDIA H100 80GB HBM3",)),
    "h200-141gb": Device(141e9, 989e12, names=("NVIDIA H200",)),
    "a100-80gb": Device(80e9, 312e12, names=("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe")),
    "b200": Device(180e9, 2250e12, names=("NVIDIA B200",)),
    "cpu-core": Device(4e9, 160e9, is_gpu=False),
}
"""By name. A CPU core is one with two AVX-512 units (64 float32 FLOPs a cycle, by Intel's manual) at 2.5 GHz, with
4 GB of memory; processors that multiply bfloat16 themselves are faster. PCIe and NVL cards of the H100 and H200 are
slower than these, and not among the names."""


@dataclass(frozen=True)
class RunEstimate:
    """Estimates of one run; `format_estimate` shows them."""

    recipe: Recipe
    spec: SwiftKVSpec
    device: str
    weight_bytes: int
    """Of a frozen weight."""
    answer_frac: float
    """Positions with loss, of all of a row."""
    teacher_parameters: int
    trained_parameters: int
    memory_parts: dict[str, float]
    """Bytes per worker, by part."""
    available_bytes: float
    """Of one worker's device, before anything is left free."""
    flops_parts: dict[str, float]
    """Per step, by part."""
    peak_flops_per_s: float
    """Of all workers."""
    utilisation_frac: float

    @property
    def trained_frac(self) -> float:
        """Trained parameters over the teacher's."""
        return self.trained_parameters / self.teacher_parameters

    @property
    def memory_bytes(self) -> float:
        """Per worker, when it holds most."""
        return sum(self.memory_parts.values())

    @property
    def fits(self) -> bool:
        """Whether a worker's device holds it, with `USABLE_FRAC` of its memory."""
        return self.memory_bytes <= USABLE_FRAC * self.available_bytes

    @property
    def flops_per_step(self) -> float:
        """Over all workers."""
        return sum(self.flops_parts.values())

    @property
    def tokens_per_s(self) -> float:
        """Tokens of rows, with or without loss, at the assumed utilisation."""
        return self.peak_tokens_per_s * self.utilisation_frac

    @property
    def peak_tokens_per_s(self) -> float:
        """The same at the devices' peak, which no run reaches."""
        return self._tokens_per_step * self.peak_flops_per_s / self.flops_per_step

    @property
    def hours(self) -> float:
        """For all steps of the recipe, at the assumed utilisation."""
        return self.recipe.training.steps * self._tokens_per_step / self.tokens_per_s / 3600

    @property
    def _tokens_per_step(self) -> int:
        return self.recipe.training.rows_per_step * self.recipe.data.row_tokens


def choose_device(recipe: Recipe) -> str:
    """The kind of device that is assumed if none is named."""
    return "h100-80gb" if recipe.workers.use_gpu else "cpu-core"


def estimate_run(
    recipe: Recipe, spec: SwiftKVSpec, device: str, weight_bytes: int = 2, answer_frac: float = ASSUMED_ANSWER_FRAC
) -> RunEstimate:
    """What the run takes on workers of this kind.

    `weight_bytes`: of a frozen weight (2: bfloat16). `answer_frac`: positions with loss, where only answers have one.
    Raises: ConfigError for a device that is not in the table, or not of the kind that the recipe asks for.
    """
    kind = _find_device(device, recipe.workers.use_gpu)
    # Rows are filled up to the one with most loss, so one source of plain text is enough to have it everywhere.
    only_answers = recipe.data.loss_on == "answers" and all(source.format != "text" for source in recipe.data.train)
    loss_frac = answer_frac if only_answers else 1.0
    work = build_workload(recipe, spec, weight_bytes, loss_frac, kind.is_gpu)
    num_workers = recipe.workers.num_workers
    cores = 1.0 if kind.is_gpu else recipe.workers.cpus_per_worker
    return RunEstimate(
        recipe=recipe,
        spec=spec,
        device=device,
        weight_bytes=weight_bytes,
        answer_frac=loss_frac,
        teacher_parameters=count_teacher_parameters(spec),
        trained_parameters=spec.count_trained_parameters(),
        memory_parts=compute_memory_parts(work, num_workers),
        available_bytes=kind.memory_bytes * cores,
        flops_parts=compute_step_flops(work, recipe.training.rows_per_step),
        peak_flops_per_s=kind.peak_flops_per_s * cores * num_workers,
        utilisation_frac=kind.utilisation_frac,
    )


def check_fit(estimate: RunEstimate) -> None:
    """Raises: ConfigError if a worker's memory is too small, naming the biggest part and a change that would do."""
    if estimate.fits:
        return
    part, size = max(estimate.memory_parts.items(), key=lambda item: item[1])
    change = _find_change(estimate)
    raise ConfigError(
        f"By estimate a worker needs {_format_bytes(estimate.memory_bytes)}, and {estimate.device} has "
        f"{_format_bytes(estimate.available_bytes)}, of which {USABLE_FRAC:.0%} is used. The biggest part: {part}, "
        f"{_format_bytes(size)}. "
        + (f"It would fit with {change}." if change else "No change that was tried fits. Use devices with more memory.")
    )


def format_estimate(estimate: RunEstimate) -> list[tuple[str, str]]:
    """Rows of a table of estimates."""
    trained, teacher = estimate.trained_parameters, estimate.teacher_parameters
    kind = DEVICES[estimate.device]
    memory = f"{_format_bytes(estimate.memory_bytes)} of {_format_bytes(estimate.available_bytes)}"
    assumed = f"at {estimate.utilisation_frac:.0%} of {estimate.device}'s peak, an assumption"
    hours, peak_hours = estimate.hours, estimate.hours * estimate.utilisation_frac
    return [
        (
            "trained parameters",
            f"{trained / 1e6:,.1f} million, {trained / teacher:.1%} of {teacher / 1e6:,.0f} million",
        ),
        ("positions with loss", f"{estimate.answer_frac:.0%}"),
        (f"memory per {'GPU' if kind.is_gpu else 'worker'}", memory),
        *((f"  {part}", _format_bytes(size)) for part, size in estimate.memory_parts.items()),
        ("FLOPs per step", _format_flops(estimate.flops_per_step)),
        *((f"  {part}", _format_flops(flops)) for part, flops in estimate.flops_parts.items()),
        ("tokens/s", f"{estimate.tokens_per_s:,.0f} ({assumed})"),
        ("tokens/s at the peak", f"{estimate.peak_tokens_per_s:,.0f}"),
        ("hours", f"{hours:,.2f} for {estimate.recipe.training.steps:,} steps ({peak_hours:,.2f} at the peak)"),
    ]


def _find_device(device: str, use_gpu: bool) -> Device:
    allowed = [name for name, kind in DEVICES.items() if kind.is_gpu == use_gpu]
    if device not in allowed:
        raise ConfigError(
            f"device is {device!r}, and workers.use_gpu is {use_gpu}: choose one of {', '.join(allowed)}, "
            "or change workers.use_gpu."
        )
    return DEVICES[device]


def build_workload(recipe: Recipe, spec: SwiftKVSpec, weight_bytes: int, loss_frac: float, is_gpu: bool) -> Workload:
    """What a worker computes in a pass of the recipe; `weight_bytes` and `is_gpu` bear on memory alone."""
    training, data = recipe.training, recipe.data
    rows = min(
        -(-training.rows_per_step // recipe.workers.num_workers), training.rows_per_pass or training.rows_per_step
    )
    half_precision = weight_bytes == 2 or training.precision == "bfloat16" or (training.precision == "auto" and is_gpu)
    return Workload(
        spec=spec,
        rows=rows,
        row_tokens=data.row_tokens,
        loss_positions=max(1, round(loss_frac * data.row_tokens)),
        packed=data.packing,
        checkpointed=training.activation_checkpointing,
        teacher_rows=training.teacher_rows or rows,
        weight_bytes=weight_bytes,
        product_bytes=2 if half_precision else 4,
    )


def _find_change(estimate: RunEstimate) -> str | None:
    """The first change of the recipe that fits, in words."""
    for change, recipe in _list_changes(estimate.recipe):
        changed = estimate_run(recipe, estimate.spec, estimate.device, estimate.weight_bytes, estimate.answer_frac)
        if changed.fits:
            return f"{change} ({_format_bytes(changed.memory_bytes)})"
    return None


def _list_changes(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """More workers, of whom each has as many rows; fewer rows at a time; less kept; shorter rows: each alone."""
    rows_per_step, row_tokens = recipe.training.rows_per_step, recipe.data.row_tokens
    for workers in range(recipe.workers.num_workers + 1, rows_per_step + 1):
        if rows_per_step % workers == 0:
            yield f"workers.num_workers: {workers}", _replace(recipe, "workers", num_workers=workers)
    yield "training.rows_per_pass: 1", _replace(recipe, "training", rows_per_pass=1)
    checkpointing = _replace(recipe, "training", activation_checkpointing=True)
    yield "training.activation_checkpointing: true", checkpointing
    yield (
        "training.rows_per_pass: 1 and training.activation_checkpointing: true",
        _replace(checkpointing, "training", rows_per_pass=1),
    )
    while (row_tokens := row_tokens // 2) >= _SHORTEST_ROW:
        yield f"data.row_tokens: {row_tokens}", _replace(recipe, "data", row_tokens=row_tokens)


def _replace(recipe: Recipe, section: str, **values: object) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def _format_flops(flops: float) -> str:
    return f"{flops / 1e12:,.1f} TFLOP" if flops >= 1e12 else f"{flops / 1e9:,.1f} GFLOP"


def _format_bytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
