"""`swiftkv distill` end to end: a real Ray job on a cluster of its own, then evaluate, publish and look."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from boards import DISTILLATION
from fakes import write_teacher
from prometheus_server import list_queries, wait_for_answers, watch
from ranks import run

from swiftkv.cluster import Cluster, find_processes, start_cluster, stop_cluster
from swiftkv.distill.data import PackedRows
from swiftkv.distill.estimate import estimate_run
from swiftkv.distill.folder import count_restarts
from swiftkv.distill.loop import Place
from swiftkv.distill.recipe import load_recipe
from swiftkv.distill.records import read_curve
from swiftkv.distill.teachers import load_teacher_spec
from swiftkv.metrics import METRICS
from swiftkv.metrics.reading import Look, find_endpoints, look
from swiftkv.model.checkpoint import load_student

pytestmark = pytest.mark.cluster

CHECKOUT = Path(__file__).parents[2]
RECIPE = "jobs/recipes/quickstart-half-laptop.yaml"
LONG_STEPS = 100
"""So that there is time to disturb a run."""


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
    write_teacher(home / "teacher", tied=True)  # named twice in a state dict
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:12]
    lines = (json.dumps({"text": source.read_text(encoding="utf-8")}) for source in sources)
    (home / "train.jsonl").write_text("\n".join(lines) + "\n")
    values = {
        "teacher": home / "teacher",
        "data.train": f"[{{files: [{home / 'train.jsonl'}]}}]",
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


def test_two_workers_give_the_weights_of_one(run_folder: Path, home: Path) -> None:
    recipe = load_recipe(run_folder / "recipe.yaml")
    assert recipe.workers.num_workers == 2
    (rows,) = (home / "rows").iterdir()
    alone = run(recipe, Place(), home, rows=PackedRows.open(rows))
    together = load_student(run_folder / "final").state_dict()
    for name, tensor in alone["weights"].items():
        found = together[name.removeprefix("model.")]
        torch.testing.assert_close(found, tensor, atol=2e-4, rtol=1e-3, msg=lambda text, name=name: name + text)
    curve = [point["loss"] for point in read_curve(run_folder)]
    assert curve == pytest.approx(alone["curve"][:, 0].tolist(), rel=1e-3)
    assert curve[-1] < curve[0]


def test_the_run_leaves_no_cluster_and_all_its_records(run_folder: Path, home: Path) -> None:
    assert not (home / "cluster.json").exists()
    records = {"recipe.yaml", "run.json", "curve.jsonl", "curve.png", "tensorboard", "provenance.json", "final"}
    records.add("starts.txt")
    assert {path.name for path in run_folder.iterdir()} == records
    points = read_curve(run_folder)
    assert [point["step"] for point in points] == list(range(1, 13))
    provenance = json.loads((run_folder / "provenance.json").read_text())
    assert provenance["training"]["last_loss"] == points[-1]["loss"]
    assert provenance["teacher"]["folder"] == str(home / "teacher")
    assert provenance["data"]["used_frac"] > 0.97
    assert count_restarts(run_folder) == 0


def test_an_ended_run_is_not_written_over(run_folder: Path, home: Path, inputs: list[str]) -> None:
    before = (run_folder / "final" / "model.safetensors").stat().st_mtime_ns
    result = swiftkv(home, "distill", RECIPE, "--output", run_folder, *inputs)
    assert result.returncode == 2 and "a run has ended here already" in result.stderr
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


@pytest.fixture(scope="module")
def cluster(home: Path, run_folder: Path) -> Iterator[Cluster]:
    """One cluster for the runs below, after the run that had one of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWIFTKV_HOME", str(home))
        started = start_cluster(num_cpus=2)
        yield started
        stop_cluster(started)


@pytest.fixture(scope="module")
def long_inputs(inputs: list[str]) -> list[str]:
    return [*inputs, "--set", f"training.steps={LONG_STEPS}", "--set", "checkpoints.every_steps=20"]


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, home: Path, long_inputs: list[str]) -> Path:
    result = swiftkv(home, "distill", RECIPE, "--output", home / "undisturbed", *long_inputs)
    assert result.returncode == 0, result.stderr + result.stdout
    return home / "undisturbed"


def assert_same_run(folder: Path, other: Path) -> None:
    """To the bit: every point of the curve, and every weight."""
    assert (folder / "curve.jsonl").read_bytes() == (other / "curve.jsonl").read_bytes()
    assert (folder / "final" / "model.safetensors").read_bytes() == (other / "final" / "model.safetensors").read_bytes()


def wait_for_steps(folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 300
    curve = folder / "curve.jsonl"
    while not curve.exists() or len(curve.read_text().splitlines()) < steps:
        assert time.monotonic() < deadline, f"{folder} took no {steps} steps"
        time.sleep(0.02)


def find_workers(cluster: Cluster) -> list[psutil.Process]:
    return [process for process in find_processes(cluster) if "TrainWorker" in " ".join(process.cmdline()[:1])]


@contextmanager
def hold(workers: list[psutil.Process]) -> Iterator[None]:
    """So that a run is not over before slow commands have come to it."""
    assert workers
    for worker in workers:
        worker.suspend()
    try:
        yield
    finally:
        for worker in workers:
            worker.resume()


def test_a_run_whose_worker_is_killed_ends_like_one_that_was_not_disturbed(
    cluster: Cluster, undisturbed: Path, home: Path, long_inputs: list[str]
) -> None:
    folder = home / "killed"
    command = [sys.executable, "-m", "swiftkv.cli", "distill", RECIPE, "--output", str(folder), *long_inputs]
    with subprocess.Popen(command, cwd=CHECKOUT, env=os.environ | {"SWIFTKV_HOME": str(home)}) as running:
        wait_for_steps(folder, 30)
        workers = find_workers(cluster)
        assert len(workers) == 2
        workers[1].kill()
        assert running.wait(300) == 0
    assert_same_run(folder, undisturbed)
    assert (count_restarts(folder), count_restarts(undisturbed)) == (1, 0)


def test_a_run_exports_all_of_its_metrics_and_that_a_worker_was_killed(
    cluster: Cluster, undisturbed: Path, home: Path, long_inputs: list[str]
) -> None:
    """One without an end, because Ray exports every ten seconds."""
    folder = home / "metered"
    words = [sys.executable, "-m", "swiftkv.cli", "distill", RECIPE, "--output", str(folder), *long_inputs]
    words += ["--set", "training.steps=100000"]
    with (
        watch(cluster, home / "prometheus") as prometheus,
        subprocess.Popen(words, cwd=CHECKOUT, env=os.environ | {"SWIFTKV_HOME": str(home)}) as running,
    ):
        try:
            wait_for_steps(folder, 30)
            find_workers(cluster)[1].kill()
            seen = wait_for_metrics(cluster, "metered", num_restarts=1)
            if prometheus:
                drawn = {panel.title for panel in DISTILLATION.panels} - {"Part of the GPUs' peak"}
                wait_for_answers(prometheus, list_queries(DISTILLATION, drawn))
        finally:
            stopped = swiftkv(home, "distill", "--stop", folder)
        assert stopped.returncode == 0 and running.wait(60) == 0
    assert count_restarts(folder) == 1
    steps = seen.sum_by("ray_swiftkv_distill_step", "WorkerId", run="metered")
    assert 0 < max(steps.values()) <= len(read_curve(folder))
    assert not seen.samples.get("ray_swiftkv_distill_flop_utilisation_frac"), "a CPU's peak is not known"
    recipe = load_recipe(folder / "recipe.yaml")
    estimate = estimate_run(recipe, load_teacher_spec(recipe), "cpu-core")
    flops, tokens = (
        seen.sum_by(f"ray_swiftkv_distill_{name}_per_second", run="metered")[()] for name in ("flops", "tokens")
    )
    # By the estimate every position of a row carries a loss, and the last one of a document has none.
    assert flops / tokens == pytest.approx(estimate.flops_per_step / (4 * 128), rel=0.05)
    waits = seen.sum_by("ray_swiftkv_distill_checkpoint_seconds_count", run="metered")[()]
    assert 0 < waits <= 2 + len(read_curve(folder)) / 20


def wait_for_metrics(cluster: Cluster, run: str, num_restarts: int) -> Look:
    """The first look that shows every metric of the run but its part of a peak, after so many restarts."""
    metrics = [metric for metric in METRICS.values() if metric.name.startswith("swiftkv_distill_")]
    wanted = {name for metric in metrics for name in metric.exported_names}
    wanted.remove("ray_swiftkv_distill_flop_utilisation_frac")
    discovery = cluster.folder / "r" / "prom_metrics_service_discovery.json"
    deadline = time.monotonic() + 90
    while True:
        seen = look(find_endpoints(discovery))
        missing = {name for name in wanted if not seen.sum_by(name, run=run)}
        restarts = seen.sum_by("ray_swiftkv_distill_restarts", run=run)
        if not missing and restarts == {(): num_restarts}:
            return seen
        assert time.monotonic() < deadline, f"missing: {missing}; restarts: {restarts}"
        time.sleep(0.5)


@pytest.mark.soak
def test_an_elastic_run_takes_the_workers_that_there_are(
    cluster: Cluster, undisturbed: Path, home: Path, long_inputs: list[str]
) -> None:
    """Three are wanted and the cluster has room for two."""
    sizes = ["--set", "workers.num_workers=3", "--set", "workers.min_workers=1"]
    result = swiftkv(home, "distill", RECIPE, "--output", home / "elastic", *long_inputs, *sizes)
    assert result.returncode == 0, result.stderr
    assert_same_run(home / "elastic", undisturbed)


def test_a_run_is_left_stopped_and_taken_up_again(
    cluster: Cluster, undisturbed: Path, home: Path, long_inputs: list[str]
) -> None:
    folder = home / "stopped"
    words = [sys.executable, "-m", "swiftkv.cli", "distill", RECIPE, "--output", str(folder), "--follow", *long_inputs]
    environment = os.environ | {"SWIFTKV_HOME": str(home)}
    with subprocess.Popen(words, cwd=CHECKOUT, env=environment, stderr=subprocess.PIPE, text=True) as following:
        wait_for_steps(folder, 2)
        with hold(find_workers(cluster)):
            following.send_signal(signal.SIGINT)
            _, said = following.communicate(timeout=60)
            stopped = swiftkv(home, "distill", "--stop", folder)
    assert following.returncode == 0 and f"swiftkv distill --stop {folder}" in said
    assert stopped.returncode == 0, stopped.stderr
    assert "saves a checkpoint at its next step" in stopped.stdout
    deadline = time.monotonic() + 120
    while (gone := swiftkv(home, "distill", "--stop", folder)).returncode == 0:
        assert time.monotonic() < deadline
    assert "no such run is going on" in gone.stderr
    assert 2 <= len(read_curve(folder)) < LONG_STEPS and not (folder / "final").exists()
    again = swiftkv(home, "distill", RECIPE, "--output", folder, *long_inputs)
    assert again.returncode == 2 and "a run has begun here already" in again.stderr

    resumed = swiftkv(home, "distill", "--resume", folder)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(folder, undisturbed)
    assert count_restarts(folder) == 0, "it was somebody's wish"
    ended = swiftkv(home, "distill", "--resume", folder)
    assert ended.returncode == 2 and "this run has ended" in ended.stderr


def test_a_loss_that_is_not_a_number_publishes_nothing(
    cluster: Cluster, undisturbed: Path, home: Path, long_inputs: list[str]
) -> None:
    folder = home / "diverged"
    beyond_float32 = ["--set", "training.hidden_loss_weight=1.0e+39"]
    result = swiftkv(home, "distill", RECIPE, "--output", folder, *long_inputs, *beyond_float32)
    assert result.returncode == 2
    assert "the loss is" in result.stderr or "norm is" in result.stderr
    assert "diverged-batch.npz" in result.stderr and "Traceback" not in result.stderr
    assert not (folder / "final").exists()
    batch = np.load(folder / "diverged-batch.npz")
    assert batch["input_ids"].shape == (4, 128) and len(batch["rows"]) == 4


def test_storage_that_is_full_leaves_the_last_checkpoint(
    cluster: Cluster, undisturbed: Path, home: Path, long_inputs: list[str]
) -> None:
    storage = home / "storage"
    storage.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", storage], check=False)
    if mounted.returncode:
        pytest.skip("a file system of a given size needs root")
    try:
        (storage / "ballast").write_bytes(bytes(1 << 20))
        small = [*long_inputs, "--set", f"checkpoints.storage={storage}", "--set", "workers.max_failures=0"]
        folder = home / "full"
        words = [sys.executable, "-m", "swiftkv.cli", "distill", RECIPE, "--output", str(folder), *small]
        environment = os.environ | {"SWIFTKV_HOME": str(home)}
        with subprocess.Popen(words, cwd=CHECKOUT, env=environment, stderr=subprocess.PIPE, text=True) as running:
            wait_for_steps(folder, 30)
            with suppress(OSError), (storage / "ballast").open("ab") as ballast:
                while True:
                    ballast.write(bytes(1 << 16))
                    ballast.flush()
            _, said = running.communicate(timeout=300)
        assert running.returncode == 2
        assert "No space left" in said and f"--resume {folder}" in said and "Traceback" not in said, said
        (storage / "ballast").unlink()
        resumed = swiftkv(home, "distill", "--resume", folder)
        assert resumed.returncode == 0, resumed.stderr
        assert_same_run(folder, undisturbed)
    finally:
        subprocess.run(["umount", storage], check=True)
