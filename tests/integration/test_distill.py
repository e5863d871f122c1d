"""`swiftkv distill` end to end: a real Ray job on a cluster of its own, then evaluate, publish and look."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakes import write_teacher

from swiftkv.distill.loop import build_student, train
from swiftkv.distill.recipe import load_recipe
from swiftkv.distill.step import DistillStep
from swiftkv.model.checkpoint import load_student, load_tokenizer
from swiftkv.text import build_rows

pytestmark = pytest.mark.cluster

CHECKOUT = Path(__file__).parents[2]
RECIPE = "jobs/recipes/quickstart-half-laptop.yaml"


def swiftkv(home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "swiftkv.cli", *map(str, arguments)],
        cwd=CHECKOUT,
        env=os.environ | {"SWIFTKV_HOME": str(home), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def inputs(home: Path) -> list[str]:
    """A tiny teacher and some real code, as overrides of the shipped recipe."""
    write_teacher(home / "teacher")
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:12]
    lines = (json.dumps({"text": source.read_text(encoding="utf-8")}) for source in sources)
    (home / "train.jsonl").write_text("\n".join(lines) + "\n")
    values = {
        "teacher": home / "teacher",
        "data.train": f"[{home / 'train.jsonl'}]",
        "data.row_tokens": 128,
        "training.steps": 12,
        "training.rows_per_step": 4,
        "training.precision": "float32",
    }
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def run_folder(home: Path, inputs: list[str]) -> Path:
    result = swiftkv(home, "distill", RECIPE, "--output", home / "run", *inputs)
    assert result.returncode == 0, result.stderr + result.stdout
    return home / "run"


def test_two_workers_give_the_weights_of_one(run_folder: Path) -> None:
    recipe = load_recipe(run_folder / "recipe.yaml")
    assert recipe.workers.num_workers == 2
    alone = build_student(recipe)
    step = DistillStep(alone, recipe.training.temperature, recipe.training.hidden_loss_weight)
    curve = []
    rows = build_rows(load_tokenizer(recipe.teacher), recipe.data.train, "text", recipe.data.row_tokens)
    train(step, rows, recipe, rank=0, world_size=1, on_log=curve.append)
    together = load_student(run_folder / "final").state_dict()
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(
            together[name], tensor, atol=2e-4, rtol=1e-3, msg=lambda text, name=name: name + text
        )
    assert curve[-1].loss < curve[0].loss


def test_the_run_leaves_no_cluster_and_all_its_records(run_folder: Path, home: Path) -> None:
    assert not (home / "cluster.json").exists()
    assert {path.name for path in run_folder.iterdir()} == {"final", "recipe.yaml", "progress.jsonl", "provenance.json"}
    lines = [json.loads(line) for line in (run_folder / "progress.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 12]
    provenance = json.loads((run_folder / "provenance.json").read_text())
    assert provenance["training"]["last_loss"] == lines[-1]["loss"]
    assert provenance["teacher"]["folder"] == str(home / "teacher")


def test_an_ended_run_is_not_written_over(run_folder: Path, home: Path, inputs: list[str]) -> None:
    before = (run_folder / "final" / "model.safetensors").stat().st_mtime_ns
    result = swiftkv(home, "distill", RECIPE, "--output", run_folder, *inputs)
    assert result.returncode == 2 and "this run has ended already" in result.stderr
    assert (run_folder / "final" / "model.safetensors").stat().st_mtime_ns == before


def test_evaluate_publish_and_show_tell_where_a_version_came_from(run_folder: Path, home: Path) -> None:
    provenance = run_folder / "provenance.json"
    data = ["--data", home / "train.jsonl", "--row-tokens", 64, "--max-rows", 6]
    result = swiftkv(home, "evaluate", run_folder / "final", *data, "--provenance", provenance)
    assert result.returncode == 0, result.stderr
    evaluation = json.loads(provenance.read_text())["evaluation"]
    assert evaluation["held_out_positions"] == 6 * 63
    assert evaluation["student_after"]["kl_nats"] < evaluation["student_before"]["kl_nats"]

    publish = ("publish", run_folder / "final", "--name", "tiny", "--version", "1", "--provenance", provenance)
    assert swiftkv(home, *publish).returncode == 0
    again = swiftkv(home, *publish)
    assert again.returncode == 2 and "1" in again.stderr and "Traceback" not in again.stderr
    shown = swiftkv(home, "models", "show", "tiny").stdout
    for text in (str(home / "teacher"), "num_key_value_layers", "last_loss", "student_after.kl_nats"):
        assert text in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("teacher=/no/such/folder", "/no/such/folder: no such folder"),
        ("cut.key_value_group_size=2", "does not divide the 3 later layers"),
        ("training.stepz=9", "training.stepz: unknown key"),
    ],
)
def test_bad_input_is_refused_before_a_cluster_is_started(
    home: Path, inputs: list[str], change: str, message: str
) -> None:
    result = swiftkv(home, "distill", RECIPE, "--output", home / "refused", *inputs, "--set", change)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert "starting a Ray cluster" not in result.stderr and not (home / "refused").exists()
