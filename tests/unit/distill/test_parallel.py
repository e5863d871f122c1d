"""FSDP2 over two processes: the losses, gradients and checkpoints of one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import write_teacher
from ranks import STEPS, Ranks, build_recipe, run

from swiftkv.distill.loop import Ending, Place


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def alone(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(build_recipe(teacher), Place(), tmp_path_factory.mktemp("alone"), None, None)


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def together(teacher: Path, pair: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return pair.run(build_recipe(teacher), tmp_path_factory.mktemp("together") / "run")


def assert_same(found: dict[str, Any], expected: dict[str, Any], exactly: bool) -> None:
    tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-4, "atol": 1e-5}
    assert found["ending"] == expected["ending"] == Ending("finished", STEPS)
    torch.testing.assert_close(found["curve"], expected["curve"], **tolerance)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in found["weights"].items():
        torch.testing.assert_close(weight, expected["weights"][name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_two_workers_take_the_steps_of_one(alone: dict[str, Any], together: dict[str, Any]) -> None:
    assert_same(together, alone, exactly=False)


@pytest.mark.parametrize(
    "changes",
    [{"rows_per_pass": 1}, {"rows_per_pass": 4}, {"activation_checkpointing": True}, {"teacher_rows": 1}],
    ids=str,
)
def test_settings_that_save_memory_change_nothing(
    teacher: Path, alone: dict[str, Any], pair: Ranks, tmp_path: Path, changes: dict[str, Any]
) -> None:
    recipe = build_recipe(teacher, **changes)
    assert_same(run(recipe, Place(), tmp_path, None, None), alone, exactly=False)
    assert_same(pair.run(recipe, tmp_path / "run"), alone, exactly=False)


def test_a_run_that_goes_on_ends_bit_for_bit_like_one_that_was_not_disturbed(
    teacher: Path, together: dict[str, Any], pair: Ranks, tmp_path: Path
) -> None:
    for checkpoint in together["saved"][:-1]:
        resumed = pair.run(build_recipe(teacher), tmp_path / checkpoint.name, checkpoint=checkpoint)
        assert_same(resumed, together, exactly=True)
        assert [figures.step for figures in resumed["figures"]] == list(range(int(checkpoint.name[5:]) + 1, STEPS + 1))


def test_another_number_of_workers_goes_on(teacher: Path, together: dict[str, Any], tmp_path: Path) -> None:
    for world_size in (1, 3):
        ranks = Ranks(world_size)
        resumed = ranks.run(build_recipe(teacher), tmp_path / str(world_size), together["saved"][0])
        ranks.close()
        assert_same(resumed, together, exactly=False)


def test_a_run_that_is_asked_to_stop_saves_its_next_step(
    teacher: Path, together: dict[str, Any], pair: Ranks, tmp_path: Path
) -> None:
    stopped = pair.run(build_recipe(teacher), tmp_path / "run", stop_after=3)
    assert stopped["ending"] == Ending("stopped", 3)
    assert stopped["saved"][-1].name == "step-3"
    resumed = pair.run(build_recipe(teacher), tmp_path / "again", checkpoint=stopped["saved"][-1])
    assert_same(resumed, together, exactly=True)


def test_a_loss_that_is_not_a_number_ends_the_run_before_the_weights_move(teacher: Path, tmp_path: Path) -> None:
    recipe = build_recipe(teacher)
    training = recipe.training.model_copy(update={"learning_rate": 1e30})  # which no recipe may have
    recipe = recipe.model_copy(update={"training": training})
    found = run(recipe, Place(), tmp_path, None, None)
    assert found["ending"].kind == "diverged"
    assert len(found["curve"]) == found["ending"].steps_done < STEPS
    assert found["curve"].isfinite().all()


def test_each_worker_keeps_its_part_of_the_weights_and_of_the_optimizer_state(
    alone: dict[str, Any], together: dict[str, Any]
) -> None:
    trained = sum(weight.numel() for weight in alone["weights"].values())
    assert alone["num_kept"]["moments"] == 2 * trained
    for kind, whole in alone["num_kept"].items():
        assert together["num_kept"][kind] == pytest.approx(whole / 2, rel=0.02)
