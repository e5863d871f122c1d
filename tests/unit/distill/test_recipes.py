"""The shipped recipes: they parse, fit the hardware they are named after, and are named after what they do."""

import logging
import re
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from swiftkv.distill.estimate import check_fit, estimate_run
from swiftkv.distill.recipe import Recipe, load_recipe
from swiftkv.distill.teachers import KNOWN_TEACHERS, load_teacher_spec
from swiftkv.spec import SwiftKVSpec

RECIPES = sorted((Path(__file__).parents[3] / "jobs" / "recipes").glob("*.yaml"))
ON_GPUS = [path for path in RECIPES if not path.stem.endswith("-laptop")]
"""The laptop's have teachers that are trained first."""
NAME = re.compile(r"(?P<model>.+?)-(?P<cut>half|quarter)(-group(?P<group>\d+))?-(?P<workers>\d+)x(?P<device>[a-z]+\d+)")
SKIPPED = {"half": 1 / 2, "quarter": 1 / 4}
DEVICES = {"h100": "h100-80gb", "h200": "h200-141gb"}
EPOCH_TOKENS = 680e6


def by_name(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Shapes from the table of known teachers."""

    def refuse(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    caplog.set_level(logging.ERROR)


def load(path: Path) -> tuple[Recipe, SwiftKVSpec, re.Match[str]]:
    name = NAME.fullmatch(path.stem)
    assert name, "<model>-<recipe>-<hardware>"
    recipe = load_recipe(path)
    return recipe, load_teacher_spec(recipe), name


def test_there_is_a_recipe_for_every_known_teacher_and_for_a_laptop() -> None:
    assert {str(load_recipe(path).teacher) for path in ON_GPUS} == set(KNOWN_TEACHERS)
    assert len(ON_GPUS) < len(RECIPES)


@by_name(RECIPES)
def test_it_parses(path: Path) -> None:
    assert load_recipe(path).training.steps > 0


@by_name(ON_GPUS)
def test_it_fits_its_hardware(path: Path) -> None:
    recipe, spec, name = load(path)
    for answer_frac in (0.5, 1.0):  # a row may be one long answer
        check_fit(estimate_run(recipe, spec, DEVICES[name["device"]], answer_frac=answer_frac))


@by_name(ON_GPUS)
def test_its_name_says_teacher_cut_groups_and_workers(path: Path) -> None:
    recipe, spec, name = load(path)
    assert recipe.teacher.name.lower().startswith(name["model"])
    assert spec.num_later_layers / spec.shape.num_hidden_layers == SKIPPED[name["cut"]]
    assert spec.key_value_group_size == int(name["group"] or 1)
    assert recipe.workers.num_workers == int(name["workers"])
    assert recipe.workers.use_gpu


@by_name(ON_GPUS)
def test_it_takes_one_epoch_of_the_papers_mix_and_every_worker_as_many_rows(path: Path) -> None:
    recipe = load_recipe(path)
    tokens = recipe.training.steps * recipe.training.rows_per_step * recipe.data.row_tokens
    assert tokens == pytest.approx(EPOCH_TOKENS, rel=0.001)
    assert recipe.training.rows_per_step % recipe.workers.num_workers == 0
    assert [source.name for source in recipe.data.train] == [
        "HuggingFaceH4/ultrachat_200k",
        "Open-Orca/SlimOrca",
        "teknium/OpenHermes-2.5",
    ]
