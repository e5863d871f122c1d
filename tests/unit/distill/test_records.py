"""What a run leaves for people to look at."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from swiftkv.distill import records
from swiftkv.distill.folder import (
    CURVE_FILE,
    STARTS_FILE,
    begin_run,
    check_resumed,
    check_run_folder,
    count_restarts,
    keep_rows,
    note_start,
    read_run_id,
    request_stop,
)
from swiftkv.distill.loop import Figures
from swiftkv.distill.progress import parse_progress
from swiftkv.distill.recipe import Recipe
from swiftkv.distill.records import RunRecorder, draw_curve, read_curve
from swiftkv.errors import ConfigError, DataError

FLOPS = 3e9
"""Of a first step; the second has twice as many, and so on."""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "teacher": str(tmp_path),
            "data": {"train": [{"files": ["unused.jsonl"]}], "row_tokens": 100},
            "training": {"steps": 6, "rows_per_step": 4, "log_every_steps": 2},
        }
    )


def take(recorder: RunRecorder, *steps: int) -> None:
    for step in steps:
        losses = 1.0 / step, 0.5 / step, 0.5 / step
        recorder.record(Figures(step, *losses, 1e-3 * step, 0.1, 400, FLOPS * step, asked_to_stop=False))
    recorder.close()


def test_the_curve_has_one_point_per_step_and_forgets_what_came_after_a_checkpoint(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    take(RunRecorder(recipe, tmp_path, torch.zeros(0, 5)), 1, 2, 3, 4, 5)
    disturbed = read_curve(tmp_path)
    assert [point["step"] for point in disturbed] == [1, 2, 3, 4, 5]
    names = ("loss", "logits_kl", "hidden_loss", "learning_rate", "gradient_norm")
    saved = torch.tensor([[point[name] for name in names] for point in disturbed[:3]], dtype=torch.float64)
    (tmp_path / CURVE_FILE).write_text("what a killed worker wrote")
    take(RunRecorder(recipe, tmp_path, saved), 4, 5, 6)
    assert read_curve(tmp_path)[:5] == disturbed
    assert [point["step"] for point in read_curve(tmp_path)] == [1, 2, 3, 4, 5, 6]
    lines = [parse_progress(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.step for line in lines if line] == [2, 4, 4, 6]
    assert lines[0] is not None and lines[0].loss == pytest.approx((1 + 1 / 2) / 2)
    assert lines[-1] is not None and lines[-1].remaining_s == 0 and lines[-1].memory_gib > 0.05


def test_tensorboard_has_every_series(recipe: Recipe, tmp_path: Path) -> None:
    take(RunRecorder(recipe, tmp_path, torch.zeros(0, 5)), 1, 2, 3)
    (file,) = (tmp_path / "tensorboard").iterdir()
    found: dict[str, list[tuple[int, float]]] = {}
    content = file.read_bytes()
    while content:  # records: length (8 bytes), its checksum (4), an event, its checksum (4)
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    assert set(found) == {
        f"distill/{name}" for name in json.loads((tmp_path / CURVE_FILE).read_text().split("\n")[0])
    } - {"distill/step"}
    assert found["distill/loss"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]


def test_the_picture_shows_something(recipe: Recipe, tmp_path: Path) -> None:
    take(RunRecorder(recipe, tmp_path, torch.zeros(0, 5)), 1, 2, 3, 4, 5, 6)
    with Image.open(draw_curve(tmp_path)) as picture:
        assert picture.width > 400 and len(picture.convert("RGB").getcolors(2**20) or ()) > 50


def test_a_folder_is_for_one_run(tmp_path: Path) -> None:
    check_run_folder(tmp_path)
    for refused in (check_resumed, request_stop):
        with pytest.raises(ConfigError, match="no run has begun here"):
            refused(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    check_resumed(tmp_path)
    request_stop(tmp_path)
    assert (tmp_path / "stop-requested").exists()
    with pytest.raises(ConfigError, match="a run has begun here already.*--resume"):
        check_run_folder(tmp_path)
    (tmp_path / "diverged-batch.npz").touch()
    with pytest.raises(ConfigError, match="this run diverged, and would again"):
        check_resumed(tmp_path)
    (tmp_path / "final").mkdir()
    with pytest.raises(ConfigError, match="this run has ended"):
        check_resumed(tmp_path)
    with pytest.raises(ConfigError, match="a run has ended here already"):
        check_run_folder(tmp_path)


def test_a_run_has_an_id_of_its_own_and_keeps_its_rows(tmp_path: Path) -> None:
    begin_run(tmp_path / "one")
    begin_run(tmp_path / "two")
    assert read_run_id(tmp_path / "one") != read_run_id(tmp_path / "two")
    with pytest.raises(ConfigError, match="a run has begun here already"):
        begin_run(tmp_path / "one")
    keep_rows(tmp_path / "one", "rows-a")
    keep_rows(tmp_path / "one", "rows-a")
    with pytest.raises(DataError, match="have changed since this run began"):
        keep_rows(tmp_path / "one", "rows-b")


@pytest.mark.parametrize("peak", [None, 1e12])
def test_flops_utilisation_and_restarts_are_metrics_of_each_line_of_progress(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peak: float | None
) -> None:
    recorded: list[dict[str, float]] = []

    def record(name: str, value: float, run: str, part: str = "") -> None:
        assert run == tmp_path.name
        if name == "swiftkv_distill_step":
            recorded.append({})
        recorded[-1][name] = value

    monkeypatch.setattr(records, "record", record)
    take(RunRecorder(recipe, tmp_path, torch.zeros(0, 5), num_restarts=2, peak_flops_per_s=peak), 1, 2, 3, 4)
    assert [values["swiftkv_distill_step"] for values in recorded] == [2, 4]
    for values, mean_step in zip(recorded, (1.5, 3.5), strict=True):
        steps_per_s = values["swiftkv_distill_tokens_per_second"] / (4 * 100)
        flops_per_s = values["swiftkv_distill_flops_per_second"]
        assert flops_per_s == pytest.approx(FLOPS * mean_step * steps_per_s)
        utilisation = values.get("swiftkv_distill_flop_utilisation_frac")
        assert utilisation == (None if peak is None else pytest.approx(flops_per_s / peak))
        assert values["swiftkv_distill_restarts"] == 2


def test_restarts_are_counted_over_the_jobs_of_a_run(tmp_path: Path) -> None:
    assert [note_start(tmp_path, job) for job in "aaab"] == [0, 1, 2, 2]
    with (tmp_path / STARTS_FILE).open("a") as starts:
        starts.write("b 2026")  # its disk was full
    assert note_start(tmp_path, "c") == count_restarts(tmp_path) == 3
