"""FLOPs of a run's steps against what torch counts, and which devices have a peak."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import write_teacher
from flops import count_flops
from ranks import build_recipe, build_rows

from swiftkv.distill import loop
from swiftkv.distill.estimate import DEVICES
from swiftkv.distill.loop import Place, Training, compute_gradients
from swiftkv.distill.utilisation import find_peak_flops_per_s
from swiftkv.distill.worker import build_step


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def build_training(teacher: Path, **settings: Any) -> Training:
    recipe = build_recipe(teacher, **settings)
    return Training(build_step(recipe), recipe, build_rows())


@pytest.mark.parametrize(
    "settings",
    [{}, {"rows_per_pass": 1}, {"rows_per_pass": 4}, {"teacher_rows": 2}, {"activation_checkpointing": True}],
    ids=str,
)
def test_flops_of_a_step_are_those_that_torch_counts(teacher: Path, settings: dict[str, Any]) -> None:
    """Of rows with losses at 0 to some 20 of 32 positions, in one pass or several, the last of which may fill up."""
    training = build_training(teacher, **settings)
    for _ in range(3):
        with count_flops() as counter:
            figures = compute_gradients(training)
        assert figures.flops == pytest.approx(counter.get_total_flops(), rel=0.01)
        training.curve = torch.cat([training.curve, torch.zeros(1, training.curve.shape[1], dtype=torch.float64)])


@pytest.mark.parametrize("world_size", [2, 4])
def test_flops_are_those_of_all_workers_with_the_rows_that_fill_up(teacher: Path, world_size: int) -> None:
    training = build_training(teacher, rows_per_pass=2)
    training.place = Place(0, world_size)
    chosen = training.choose_rows()
    shares = [training.share_rows(chosen, rank) for rank in range(world_size)]
    assert any(-1 in numbers for share in shares for numbers in share)
    with count_flops() as counter:
        for numbers in (numbers for share in shares for numbers in share):
            loop._run_pass(training, numbers, num_positions=100)
    assert training.count_flops(chosen) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_only_known_gpus_have_a_peak_and_only_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    found = {}
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        found[name] = find_peak_flops_per_s(gpu, bfloat16=True)
        assert find_peak_flops_per_s(gpu, bfloat16=False) is None
    assert list(found.values()) == [989e12, None, 312e12, None]
    assert find_peak_flops_per_s(torch.device("cpu"), bfloat16=True) is None
    names = [name for kind in DEVICES.values() for name in kind.names]
    assert len(names) == len(set(names)) and not DEVICES["cpu-core"].names
