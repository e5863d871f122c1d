"""The newest whole checkpoint, where Ray Train's list of them was lost."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import save

from swiftkv.distill.recovery import LIST_FILE, recover_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for step in (10, 20, 30):
        state = {"weights": torch.full((50, 50), float(step)), "steps_done": torch.tensor(step)}
        save(state, checkpoint_id=folder / f"step-{step:08d}", no_dist=True)
    (folder / LIST_FILE).write_text("")
    return folder


def recover(run: Path) -> Path | None:
    found = recover_checkpoint(str(run.parent), run.name)
    return None if found is None else Path(found)


def test_the_newest_is_found_and_the_others_go(run):
    assert recover(run) == run / "step-00000030"
    assert [path.name for path in run.iterdir()] == ["step-00000030"]
    assert recover(run) is None, "the list is gone: Ray Train begins another"


def cut_off(folder: Path) -> None:
    file = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage",
    [
        cut_off,
        lambda folder: (folder / ".metadata").unlink(),
        lambda folder: (folder / ".metadata").write_bytes(b""),
        lambda folder: next(folder.glob("*.distcp")).unlink(),
        lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    ],
)
def test_what_is_not_whole_is_passed_over(run, damage):
    damage(run / "step-00000030")
    assert recover(run) == run / "step-00000020"


def test_a_list_that_can_be_read_is_ray_trains(run):
    for content in ("{}", None):
        (run / LIST_FILE).unlink() if content is None else (run / LIST_FILE).write_text(content)
        assert recover(run) is None
        assert len(list(run.glob("step-*"))) == 3


def test_a_run_without_a_whole_checkpoint_begins_again(run):
    for folder in run.glob("step-*"):
        shutil.rmtree(folder)
    assert recover(run) is None and not (run / LIST_FILE).exists()
    assert recover_checkpoint(str(run.parent), "none-such") is None
