"""Estimates of a run against what real tiny models and steps hold and compute, counted by other means."""

import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from flops import count_flops

from swiftkv.bench.distill import build_random_student
from swiftkv.bench.memory import PeakMemory
from swiftkv.bench.models import LLAMA_8B_SHAPE
from swiftkv.distill import losses
from swiftkv.distill.costs import TILE_LOGITS
from swiftkv.distill.estimate import (
    DEVICES,
    USABLE_FRAC,
    RunEstimate,
    check_fit,
    choose_device,
    estimate_run,
    format_estimate,
)
from swiftkv.distill.recipe import Recipe
from swiftkv.distill.step import Batch, DistillStep
from swiftkv.errors import ConfigError
from swiftkv.model.convert import freeze_teacher
from swiftkv.spec import ModelShape, SwiftKVSpec

SHAPE = ModelShape(128, 448, 8, 4, 2, 32, 512)
SPEC = SwiftKVSpec(SHAPE, 4)
EIGHT_B = SwiftKVSpec(LLAMA_8B_SHAPE, 16)
ROWS, TOKENS, ANSWER_FRAC = 2, 256, 0.125


def build_recipe(gpu: bool = False, tokens: int = TOKENS, workers: int = 1, **training: Any) -> Recipe:
    training = {"steps": 10, "rows_per_step": ROWS, "precision": "float32"} | training
    return Recipe.model_validate(
        {
            "teacher": "teacher",
            "data": {"train": [{"files": ["a.jsonl"], "format": "chat"}], "row_tokens": tokens, "packing": False},
            "training": training,
            "workers": {"num_workers": workers, "use_gpu": gpu},
        }
    )


def change_data(recipe: Recipe, **values: Any) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=values)})


def estimate_tiny(dtype: torch.dtype, answer_frac: float, packed: bool, checkpointed: bool) -> RunEstimate:
    recipe = build_recipe(activation_checkpointing=checkpointed)
    recipe = change_data(recipe, packing=packed)
    return estimate_run(recipe, SPEC, "cpu-core", 4 if dtype == torch.float32 else 2, answer_frac)


class RealStep:
    """Forward and backward of what the estimate is about."""

    def __init__(self, dtype: torch.dtype, answer_frac: float, packed: bool, checkpointed: bool) -> None:
        torch.manual_seed(0)
        model = build_random_student(SHAPE).to(dtype)
        freeze_teacher(model)
        for layer in model.model.later_layers:
            layer.checkpoints_activations = checkpointed
        self.dtype, self.step = dtype, DistillStep(model, 2.0, 1.0)
        positions = None
        if answer_frac < 1:
            positions = torch.arange(TOKENS - round(TOKENS * answer_frac), TOKENS).expand(ROWS, -1)
        places = (torch.arange(TOKENS) % (TOKENS // 4)).expand(ROWS, -1) if packed else None
        self.batch = Batch(torch.randint(SHAPE.vocab_size, (ROWS, TOKENS)), positions, None, places)

    def run(self) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = self.step(self.batch, ROWS * TOKENS)["loss"]
        loss.backward()

    def measure_peak_bytes(self) -> int:
        self.run()  # gradients exist from here on
        with PeakMemory() as memory:
            self.run()
        return memory.peak_bytes


EVERY_WAY = [
    pytest.param(frac, packed, checkpointed, id=f"{'all' if frac == 1 else 'answers'}-{packed=}-{checkpointed=}")
    for frac in (1.0, ANSWER_FRAC)
    for packed in (False, True)
    for checkpointed in (False, True)
]


@pytest.mark.parametrize(("answer_frac", "packed", "checkpointed"), EVERY_WAY)
def test_flops_are_those_that_torch_counts(answer_frac: float, packed: bool, checkpointed: bool) -> None:
    real = RealStep(torch.float32, answer_frac, packed, checkpointed)
    with count_flops() as counter:
        real.run()
    estimate = estimate_tiny(torch.float32, answer_frac, packed, checkpointed)
    assert estimate.flops_per_step == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("answer_frac", "packed", "checkpointed"), EVERY_WAY)
def test_memory_beyond_the_weights_is_what_a_step_holds(
    dtype: torch.dtype, answer_frac: float, packed: bool, checkpointed: bool
) -> None:
    estimate = estimate_tiny(dtype, answer_frac, packed, checkpointed)
    weights = sum(estimate.memory_parts[part] for part in ("frozen weights", "trained weights, gradients, optimizer"))
    real = RealStep(dtype, answer_frac, packed, checkpointed).measure_peak_bytes()
    assert 0.85 < (estimate.memory_bytes - weights) / real < 1.3


def test_memory_of_weights_is_that_of_a_real_models_parameters() -> None:
    model = build_random_student(SHAPE)
    trained = sum(parameter.numel() for parameter in freeze_teacher(model))
    frozen = sum(parameter.numel() for parameter in model.parameters()) - trained
    estimate = estimate_tiny(torch.float32, 1.0, False, False)
    assert (estimate.trained_parameters, estimate.teacher_parameters) == (trained, frozen)
    assert estimate.memory_parts["frozen weights"] == 4 * frozen
    assert estimate.memory_parts["trained weights, gradients, optimizer"] == 16 * trained


@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_trained_parameters_of_groups_are_those_of_a_real_model(group_size: int) -> None:
    from swiftkv.bench.models import build_config_values
    from swiftkv.hf_config import CONFIG_CLASSES
    from swiftkv.model.modeling import MODEL_CLASSES

    values = build_config_values(SHAPE) | {"num_key_value_layers": 4, "key_value_group_size": group_size}
    with torch.device("meta"):
        model = MODEL_CLASSES["llama_swiftkv"](CONFIG_CLASSES["llama_swiftkv"](**values))
    trained = sum(parameter.numel() for parameter in freeze_teacher(model))
    spec = SwiftKVSpec(SHAPE, 4, group_size)
    assert estimate_run(build_recipe(), spec, "cpu-core").trained_parameters == trained


def test_published_sizes() -> None:
    seventy = replace(LLAMA_8B_SHAPE, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80)
    seventy = replace(seventy, num_attention_heads=64)
    estimates = [estimate_run(build_recipe(), spec, "cpu-core") for spec in (EIGHT_B, SwiftKVSpec(seventy, 40))]
    assert [round(e.trained_parameters / 1e6, 1) for e in estimates] == [402.7, 3355.5]
    assert [round(e.trained_frac, 3) for e in estimates] == [0.05, 0.048]


def test_weights_are_divided_over_the_workers_and_gathered_by_layers() -> None:
    one, eight = (estimate_run(build_recipe(True, workers=n, rows_per_step=8), EIGHT_B, "h100-80gb") for n in (1, 8))
    for part in ("frozen weights", "trained weights, gradients, optimizer"):
        assert eight.memory_parts[part] == one.memory_parts[part] / 8
    assert one.memory_parts["gathered layers and vocabulary"] == 0
    # Two layers of 218 million weights and two tables of 525 million in bfloat16, and what is trained of a layer.
    assert eight.memory_parts["gathered layers and vocabulary"] == pytest.approx(3.27e9, rel=0.01)


def test_time_is_flops_over_the_devices_assumed_speed() -> None:
    estimate = estimate_run(build_recipe(True, workers=2), EIGHT_B, "a100-80gb")
    seconds = estimate.flops_per_step / (2 * 312e12 * 0.4)
    assert estimate.hours == pytest.approx(10 * seconds / 3600)
    assert estimate.tokens_per_s == pytest.approx(ROWS * TOKENS / seconds)
    assert estimate.peak_tokens_per_s == pytest.approx(estimate.tokens_per_s / 0.4)


def test_a_worker_is_as_fast_and_as_large_as_its_cores() -> None:
    recipe = build_recipe()
    workers = recipe.workers.model_copy(update={"cpus_per_worker": 4})
    four = estimate_run(recipe.model_copy(update={"workers": workers}), SPEC, "cpu-core")
    one = estimate_run(recipe, SPEC, "cpu-core")
    assert four.tokens_per_s == pytest.approx(4 * one.tokens_per_s)
    assert four.available_bytes == 4 * one.available_bytes


def test_plain_text_among_chats_puts_the_loss_everywhere() -> None:
    recipe = build_recipe()
    text = recipe.data.train[0].model_copy(update={"format": "text"})
    assert estimate_run(recipe, SPEC, "cpu-core").answer_frac < 1
    assert estimate_run(change_data(recipe, loss_on="all"), SPEC, "cpu-core").answer_frac == 1
    assert estimate_run(change_data(recipe, train=[*recipe.data.train, text]), SPEC, "cpu-core").answer_frac == 1


def too_big(**changes: Any) -> Recipe:
    """Llama-3.1-8B on one GPU with 8 rows of 8,192 at once."""
    return build_recipe(True, **({"tokens": 8192, "rows_per_step": 8, "precision": "auto"} | changes))


@pytest.mark.parametrize(
    ("recipe", "device", "change", "setting"),
    [
        (too_big(), "h100-80gb", {"workers": {"num_workers": 4}}, "workers.num_workers: 4"),
        (too_big(rows_per_step=7, workers=7, tokens=16384), "h100-80gb", {}, None),
        (too_big(workers=8, rows_per_step=64), "h100-80gb", {"workers": {"num_workers": 32}}, "num_workers: 32"),
        (too_big(workers=8, tokens=65536), "h100-80gb", {}, "training.activation_checkpointing: true"),
        (too_big(workers=8, tokens=131072), "h100-80gb", {}, "data.row_tokens"),
    ],
)
def test_what_would_fit_is_computed(
    recipe: Recipe, device: str, change: dict[str, dict[str, int]], setting: str | None
) -> None:
    estimate = estimate_run(recipe, EIGHT_B, device)
    if setting is None:
        check_fit(estimate)
        return
    with pytest.raises(ConfigError, match="student's activations") as error:
        check_fit(estimate)
    assert setting in str(error.value)
    for section, values in change.items():
        changed = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})
        check_fit(estimate_run(changed, EIGHT_B, device))


def test_the_number_of_workers_named_is_the_smallest_that_fits() -> None:
    recipe = too_big(rows_per_step=32)
    with pytest.raises(ConfigError) as error:
        check_fit(estimate_run(recipe, EIGHT_B, "h100-80gb"))
    found = re.search(r"num_workers: (\d+)", str(error.value))
    assert found
    named = int(found[1])
    for workers in (2, 4, 8, 16, 32):
        estimate = estimate_run(too_big(rows_per_step=32, workers=workers), EIGHT_B, "h100-80gb")
        assert estimate.fits == (workers >= named)


def test_a_model_that_no_change_helps_is_said_to_be_too_big() -> None:
    huge = SwiftKVSpec(replace(LLAMA_8B_SHAPE, num_hidden_layers=640), 320)
    with pytest.raises(ConfigError, match="frozen weights.*No change that was tried fits"):
        check_fit(estimate_run(too_big(rows_per_step=1, tokens=1024), huge, "h100-80gb"))


def test_a_device_of_another_kind_than_the_recipes_is_refused() -> None:
    assert choose_device(build_recipe()) == "cpu-core"
    assert choose_device(build_recipe(True)) == "h100-80gb"
    with pytest.raises(ConfigError, match="one of cpu-core"):
        estimate_run(build_recipe(), SPEC, "h100-80gb")
    with pytest.raises(ConfigError, match="one of h100-80gb, h200-141gb"):
        estimate_run(build_recipe(True), SPEC, "h300")


def test_the_table_calls_every_row_an_estimate() -> None:
    estimate = estimate_run(build_recipe(True), EIGHT_B, "h100-80gb")
    rows = dict(format_estimate(estimate))
    assert rows["trained parameters"] == "402.7 million, 5.0% of 8,030 million"
    assert "40% of h100-80gb's peak, an assumption" in rows["tokens/s"]
    assert rows["FLOPs per step"].endswith(" TFLOP")
    small = dict(format_estimate(estimate_run(build_recipe(), SPEC, "cpu-core")))
    assert float(small["FLOPs per step"].removesuffix(" GFLOP").replace(",", "")) > 0


def test_the_loss_has_the_tile_that_is_counted() -> None:
    assert TILE_LOGITS == losses.TILE_LOGITS
    assert USABLE_FRAC < 1
    assert all(kind.utilisation_frac < 1 for kind in DEVICES.values())


def test_estimates_load_no_torch() -> None:
    code = "import sys, swiftkv.distill.estimate, swiftkv.distill.teachers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
