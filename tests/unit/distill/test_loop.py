"""The training loop without Ray: a golden loss curve, and the same curve for any number of workers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import write_teacher

from swiftkv.distill.checkpoints import build_state
from swiftkv.distill.data import PackedRows, choose_rows
from swiftkv.distill.loop import Ending, Figures, Training, train
from swiftkv.distill.progress import Progress, parse_progress
from swiftkv.distill.recipe import Recipe, load_recipe, parse_overrides, save_recipe
from swiftkv.distill.step import DistillStep
from swiftkv.distill.worker import build_step
from swiftkv.errors import ConfigError

GOLDEN = Path(__file__).parents[2] / "golden" / "distill_loss.json"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "teacher": str(write_teacher(tmp_path / "teacher")),
            "cut": {"num_key_value_layers": 2, "key_value_group_size": 2},
            "data": {"train": [{"files": ["unused.jsonl"]}], "row_tokens": 32},
            "training": {
                "steps": 20,
                "rows_per_step": 4,
                "learning_rate": 5e-3,
                "log_every_steps": 1,
                "precision": "float32",
            },
            "workers": {"num_workers": 1},
        }
    )


class Notes:
    """Surroundings that keep what they are told."""

    def __init__(self) -> None:
        self.figures: list[Figures] = []

    def log(self, figures: Figures) -> None:
        self.figures.append(figures)

    def save(self, curve: torch.Tensor) -> None:
        """Nothing goes on from here."""

    def hand_over(self) -> None:
        """Nothing was saved."""

    def wants_to_stop(self) -> bool:
        return False


def run(recipe: Recipe, step: DistillStep | None = None) -> list[Figures]:
    """Steps on rows of one document each, with a loss everywhere."""
    input_ids = np.random.default_rng(0).integers(0, 256, (24, recipe.data.row_tokens), dtype=np.int32)
    everywhere = np.ones(input_ids.shape, dtype=np.bool_)
    position_ids = np.broadcast_to(np.arange(input_ids.shape[1], dtype=np.int32), input_ids.shape)
    rows = PackedRows(input_ids, position_ids, everywhere, everywhere.sum(1), used_frac=1.0)
    notes = Notes()
    ending = train(Training(step or build_step(recipe), recipe, rows), 100, notes)
    assert ending == Ending("finished", recipe.training.steps)
    return notes.figures


def test_twenty_steps_follow_the_golden_curve(recipe: Recipe) -> None:
    """To write the curve again after the maths changed on purpose: delete the file and run this test."""
    curve = [{"logits_kl": p.logits_kl, "hidden_loss": p.hidden_loss} for p in run(recipe)]
    if not GOLDEN.exists():
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(curve, indent=1) + "\n")
        pytest.fail(f"wrote {GOLDEN}; look at it, commit it, and run again")
    golden = json.loads(GOLDEN.read_text())
    assert len(curve) == len(golden) == 20
    for measured, expected in zip(curve, golden, strict=True):
        assert measured == pytest.approx(expected, rel=2e-3)
    assert curve[-1]["logits_kl"] < 0.7 * curve[0]["logits_kl"]


def test_the_teacher_is_untouched_by_training(recipe: Recipe) -> None:
    torch.manual_seed(0)
    step = build_step(recipe)
    before = {name: tensor.clone() for name, tensor in step.state_dict().items()}
    run(recipe, step)
    changed = {name for name, tensor in step.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "swiftkv" in name}


def test_rows_of_a_step_do_not_depend_on_the_number_of_workers_and_an_epoch_has_each_row_once() -> None:
    batches = [choose_rows(step, rows_per_step=6, num_rows=20, seed=3) for step in range(10)]
    flat = np.concatenate(batches)
    for epoch in range(3):
        assert sorted(flat[epoch * 20 : (epoch + 1) * 20]) == list(range(20))
    assert not np.array_equal(flat[:20], flat[20:40])
    shares = [batches[4][rank::3] for rank in range(3)]
    assert sorted(np.concatenate(shares)) == sorted(batches[4])
    assert not np.array_equal(batches[0], choose_rows(0, 6, 20, seed=4))


def test_a_line_of_progress_is_read_back_behind_rays_prefix() -> None:
    progress = Progress(5, 20, 1.25, 1.0, 0.25, 2e-4, 0.75, 1234.0, 5.5e12, 1.5, 61.0)
    assert parse_progress(f"(TrainWorker pid=1, ip=127.0.0.1) {progress.format_line()}") == progress
    assert parse_progress("distill something else") is None


def test_a_saved_recipe_is_the_recipe(recipe: Recipe, tmp_path: Path) -> None:
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    changed = load_recipe(tmp_path / "recipe.yaml", parse_overrides(["training.steps=7", "cut.key_value_group_size=1"]))
    assert changed.training.steps == 7 and changed.cut.key_value_group_size == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.stepz", "3", r"training.stepz: unknown key. Nearest: steps. Allowed here: .*steps"),
        ("training.steps", "0", "training.steps: .*greater than or equal to 1.*given: 0"),
        ("workers.min_workers", "3", r"min_workers is 3, more than num_workers \(2\)"),
        ("data.train", "[{format: chat}]", r"data.train.0: give `name` .* or `files`, and not both"),
        ("teacher.name", "x", "teacher is not a section"),
        ("cut.key_value_group_size", "two", "should be a whole number"),
    ],
)
def test_wrong_recipes_say_what_is_allowed(recipe: Recipe, tmp_path: Path, key: str, value: str, message: str) -> None:
    save_recipe(
        recipe.model_copy(update={"workers": recipe.workers.model_copy(update={"num_workers": 2})}),
        tmp_path / "recipe.yaml",
    )
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "recipe.yaml", {key: value})


def test_an_override_needs_a_value() -> None:
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        parse_overrides(["training.steps"])


def test_bfloat16_follows_the_curve_of_float32(recipe: Recipe) -> None:
    bfloat16 = recipe.model_copy(update={"training": recipe.training.model_copy(update={"precision": "bfloat16"})})
    for measured, expected in zip(run(bfloat16), run(recipe), strict=True):
        assert measured.loss == pytest.approx(expected.loss, rel=0.05)
        assert measured.loss != expected.loss


def test_yaml_that_is_none_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match=r"bad.yaml: not valid YAML"):
        load_recipe(tmp_path / "bad.yaml", {"training.steps": "1"})


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_holds_what_is_trained_and_nothing_else(recipe, tmp_path, tied):
    teacher = write_teacher(tmp_path / "another", tied=tied)
    step = build_step(recipe.model_copy(update={"teacher": teacher}))
    trained = {name for name, parameter in step.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW([parameter for parameter in step.parameters() if parameter.requires_grad])
    state = build_state(step, optimizer, torch.zeros(0, 1))
    assert state["student"].keys() == trained and all("swiftkv" in name for name in trained)
