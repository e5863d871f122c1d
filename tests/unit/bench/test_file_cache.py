"""Counts of what lies in memory, on real files, and of what an engine needs of a checkpoint."""

import os
from pathlib import Path

import pytest
from fakes import TinyShape, write_student
from safetensors.torch import load_file

from swiftkv.bench.file_cache import Run, count_resident_bytes, drop_from_memory, list_wanted_runs

MIB = 2**20


@pytest.fixture
def cold_file(tmp_path: Path) -> Path:
    """64 MiB and a bit, none of it in memory."""
    file = tmp_path / "cold"
    file.write_bytes(os.urandom(MIB) * 64 + b"beyond the last whole page")
    drop_from_memory([file])
    if count_resident_bytes([file]):
        pytest.skip("this file system keeps files in memory (tmpfs?)")
    return file


def test_a_file_that_was_read_whole_lies_in_memory_whole(cold_file: Path) -> None:
    cold_file.read_bytes()
    assert count_resident_bytes([cold_file]) == cold_file.stat().st_size == 64 * MIB + 26
    drop_from_memory([cold_file])
    assert count_resident_bytes([cold_file]) == 0


def test_of_a_file_read_in_part_that_part_lies_in_memory_and_what_was_read_ahead(cold_file: Path) -> None:
    with cold_file.open("rb") as opened:
        opened.seek(40 * MIB)
        opened.read(4 * MIB)
    assert 4 * MIB <= count_resident_bytes([cold_file]) <= 24 * MIB


def test_counts_of_files_add_up_and_an_empty_file_counts_nothing(tmp_path: Path) -> None:
    for name, size in (("a", 5000), ("b", 0), ("c", 4096)):
        (tmp_path / name).write_bytes(bytes(size))
    assert count_resident_bytes([tmp_path / name for name in "abc"]) == 9096


@pytest.mark.parametrize("prefill_only", [True, False])
def test_wanted_runs_hold_the_tensors_of_the_role(prefill_only: bool, tmp_path: Path) -> None:
    """Tensors are looked up by their bytes, not by what the header says."""
    folder = write_student(tmp_path, TinyShape(), 3, 1, num_shards=2)
    wanted, unwanted = [], []
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            part = name.split(".")
            later = part[1] == "layers" and int(part[2]) >= 3
            if later and prefill_only:
                takes = part[-2] in ("k_proj_swiftkv", "v_proj_swiftkv")
            elif later:
                takes = part[-2] not in ("q_proj", "k_proj", "v_proj")
            else:
                takes = not prefill_only or name not in ("model.norm.weight", "lm_head.weight")
            (wanted if takes else unwanted).append((file, tensor.numpy().tobytes()))
    runs = list_wanted_runs(folder, prefill_only)
    assert sum(run.end - run.start for run in runs) == sum(len(data) for _, data in wanted)
    assert all(any(data in read(run) for run in runs if run.file == file) for file, data in wanted)
    assert not any(data in read(run) for run in runs for file, data in unwanted if run.file == file)


def read(run: Run) -> bytes:
    return run.file.read_bytes()[run.start : run.end]


def test_runs_that_touch_are_one(tmp_path: Path) -> None:
    folder = write_student(tmp_path, TinyShape(), 6, 1, keep_teacher_projections=False)
    (run,) = list_wanted_runs(folder, prefill_only=False)
    file = folder / "model.safetensors"
    assert run.end == file.stat().st_size
    assert run.start == 8 + int.from_bytes(file.read_bytes()[:8], "little")
