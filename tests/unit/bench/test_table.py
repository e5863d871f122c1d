"""The engine bench's table: when a bound is kept, and how the rows are shown."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from swiftkv.bench.ratios import compute_ratio
from swiftkv.bench.table import ROW_NAMES, ROWS, Result, build_markdown, draw
from swiftkv.cli.bench import bench_app
from swiftkv.errors import ConfigError

BY_NAME = {row.name: row for row in ROWS}


def build_result(name: str, *values: float) -> Result:
    return Result(BY_NAME[name], compute_ratio(values, [1.0] * len(values)), "400 tokens/s", "740 tokens/s")


@pytest.mark.parametrize(
    ("name", "value", "is_met"),
    [("prefill", 0.95, True), ("prefill", 0.949, False), ("ttft", 0.62, True), ("ttft", 0.621, False)],
)
def test_a_bound_is_kept_from_the_right_side(name: str, value: float, is_met: bool) -> None:
    assert build_result(name, value).is_met is is_met


def test_the_median_decides_and_a_missed_bound_is_shown() -> None:
    result = build_result("tpot", 1.0, 1.5, 1.6)
    text = build_markdown([result, build_result("kv-group-2", 1.34)])
    assert not result.is_met and "**no**" in text and "1.500" in text and "≤ 1.02" in text
    assert "counted, not timed" in text.splitlines()[-1] and text.splitlines()[-1].endswith("| yes |")


def test_json_has_every_pair_and_the_bound() -> None:
    entry = json.loads(json.dumps(build_result("prefill", 1.0, 0.9, 0.98).to_json()))
    assert entry["pairs"] == [1.0, 0.9, 0.98] and entry["bound"] == "at least 0.95" and entry["is_met"]
    assert entry["low"] <= entry["median"] <= entry["high"]


def test_the_picture_has_every_row(tmp_path: Path) -> None:
    draw([build_result(name, 1.0, 1.1) for name in ROW_NAMES], "title", tmp_path / "table.png")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("rows", ["", "prefil", "prefill,nothing"])
def test_an_unknown_row_is_refused_with_the_names_there_are(rows: str) -> None:
    result = CliRunner().invoke(bench_app, ["engine", "--rows", rows])
    assert isinstance(result.exception, ConfigError) and "kv-group-2-fp8" in str(result.exception)


def test_a_device_that_vllm_is_not_built_for_is_refused() -> None:
    result = CliRunner().invoke(bench_app, ["engine", "--device", "cuda"])
    assert isinstance(result.exception, ConfigError) and "--device is cuda" in str(result.exception)
