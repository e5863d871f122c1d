"""`swiftkv bench …`: the published comparisons, each measured again by one command.

Called by: cli/main.py. Calls: bench/engine.py, bench/distill.py, bench/registry.py, bench/table.py.
"""

import dataclasses
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from swiftkv.bench.serve.rows import ROW_BY_NAME as SERVE_ROW_BY_NAME
from swiftkv.bench.serve.rows import ROW_NAMES as SERVE_ROW_NAMES
from swiftkv.bench.table import ROW_NAMES, Result, Row, build_markdown, draw
from swiftkv.errors import ConfigError, EngineError

bench_app = typer.Typer(help="Measure what the README claims, on this machine.", no_args_is_help=True)


@bench_app.callback()
def _bench() -> None:
    """Measure what the README claims, on this machine."""


@bench_app.command()
def engine(
    rows: Annotated[str, typer.Option(help=f"all, or some of {', '.join(ROW_NAMES)}, with commas.")] = "prefill",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    report: Annotated[Path | None, typer.Option(help="Also write numbers.json, table.md and table.png here.")] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="cuda takes the shape of Llama-3.1-8B.")] = "cpu",
    prompt_tokens: Annotated[int, typer.Option(help="Length of prompts that come one at a time.", min=16)] = 2000,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded after each of these.", min=2)] = 17,
    load_prompt_tokens: Annotated[int, typer.Option(help="Length of prompts that come 16 at once.", min=16)] = 1000,
    pairs: Annotated[int, typer.Option(help="Pairs of passes that take turns.", min=1)] = 5,
) -> None:
    """A SwiftKV model against its unmodified teacher in vLLM, random weights, half the layers skipped.

    The first row and the check of tokens take four to seven minutes on two CPU cores, all rows about 25. Exits with
    an error if skipping changes tokens; a bound that is not kept is shown as such.
    """
    names = _parse_rows(rows, ROW_NAMES)
    _check_device(device)
    from swiftkv.bench.engine import GPU, Bench, plan_for_cpu

    plan = dataclasses.replace(
        GPU if device == "cuda" else plan_for_cpu(),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        load_prompt_tokens=load_prompt_tokens,
        pairs=pairs,
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="swiftkv-bench-") as folder:
        bench = Bench(plan, Path(folder), _stage)
        results = bench.measure_rows(names)
        same = bench.check_tokens()
    _publish(results, bench.figures, started, "SwiftKV in vLLM against its teacher", json_file, report)
    if not same:
        raise EngineError("the student's tokens with and without skipping differ; its speed means nothing.")


@bench_app.command()
def serve(
    rows: Annotated[str, typer.Option(help=f"all, or some of {', '.join(SERVE_ROW_NAMES)}, with commas.")] = "all",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Also write numbers.json, table.md and table.png here; rows of earlier runs stay in them."),
    ] = None,
    pairs: Annotated[int, typer.Option(help="Pairs of loads that take turns, in the two rows of overhead.", min=1)] = 7,
) -> None:
    """Two pools, the gateway and the policy against one engine and vLLM's own server: real engines, random weights.

    Needs two CPU cores, on which nothing else runs. All rows take about two hours, `shapes` and `flood` half an hour
    each.
    """
    names = _parse_rows(rows, SERVE_ROW_NAMES)
    from swiftkv.bench.serve.run import Plan, ServeBench

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="swiftkv-bench-") as folder:
        bench = ServeBench(Plan(pairs=pairs), Path(folder), _stage)
        if report is not None:
            _check_hardware(report, bench.figures["hardware"])
        results = bench.measure_rows(names)
    _publish(results, bench.figures, started, "Serving from two pools", json_file, report, SERVE_ROW_BY_NAME)


@bench_app.command()
def distill(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    report: Annotated[Path | None, typer.Option(help="Also write numbers.json, table.md and table.png here.")] = None,
    row_tokens: Annotated[int, typer.Option(help="Length of the row of a step.", min=64)] = 1024,
    pairs: Annotated[int, typer.Option(help="Pairs of steps that take turns.", min=2)] = 9,
) -> None:
    """A distillation step against the reference recipe's, which runs teacher and student as two whole passes.

    Random weights, half the layers skipped; one row, with loss everywhere and on its last eighth. Takes about two
    minutes on two CPU cores. Exits with an error if the two sides' losses differ.
    """
    from swiftkv.bench.distill import DistillPlan, measure_distillation

    plan = DistillPlan(row_tokens=row_tokens, answer_tokens=row_tokens // 8, pairs=pairs)
    started = time.monotonic()
    results, figures = measure_distillation(plan, _stage)
    _publish(results, figures, started, "A distillation step against the reference's", json_file, report)


@bench_app.command()
def registry(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    report: Annotated[Path | None, typer.Option(help="Also write numbers.json, table.md and table.png here.")] = None,
    gigabytes: Annotated[float, typer.Option(help="Size of the version.", min=0.001)] = 2.0,
    pairs: Annotated[int, typer.Option(help="Pairs of runs that take turns.", min=1)] = 5,
) -> None:
    """Publishing and pulling a version against cp or `aws s3 cp` followed by sha256sum, files out of memory before.

    The bucket is a local S3 server's. Takes about ten minutes and three times the version's size on the disk.
    """
    from swiftkv.bench.registry import measure_registry

    started = time.monotonic()
    results, figures = measure_registry(int(gigabytes * 1e9), pairs, _stage)
    _publish(results, figures, started, "The registry against copying and hashing", json_file, report)


def _publish(
    results: list[Result],
    figures: dict[str, Any],
    started: float,
    title: str,
    json_file: Path | None,
    report: Path | None,
    kept_rows: Mapping[str, Row] | None = None,
) -> None:
    """Print the figures and the table, and write the files asked for. Of `kept_rows` the report keeps those that it has
    and that were not measured now, each with the command that did."""
    command = _describe_command(sys.argv[1:])
    figures = figures | {
        "rows": [result.to_json() | {"command": command} for result in results],
        "command": command,
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    typer.echo(json.dumps(figures, indent=2))
    typer.echo(build_markdown(results))
    if json_file is not None:
        _write_json(json_file, figures)
    if report is not None:
        if kept_rows is not None and (report / "numbers.json").exists():
            figures, results = _keep_rows(report / "numbers.json", figures, kept_rows)
        _write_report(report, figures, results, title)


def _describe_command(arguments: Sequence[str]) -> str:
    """What measures the figures again: the command without the files of this machine that it wrote to."""
    kept, waiting = [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if argument in ("--json", "--report"):
            del waiting[:1]
        elif not argument.startswith(("--json=", "--report=")):
            kept.append(argument)
    return shlex.join(["swiftkv", *kept])


def _keep_rows(path: Path, figures: dict[str, Any], rows: Mapping[str, Row]) -> tuple[dict[str, Any], list[Result]]:
    """The figures with those of an earlier report beside them, and all rows in the table's order."""
    earlier = json.loads(path.read_text(encoding="utf-8"))
    entries = {entry["row"]: entry for entry in [*earlier["rows"], *figures["rows"]]}
    kept = [entries[name] for name in rows if name in entries]
    return earlier | figures | {"rows": kept}, [Result.from_json(entry, rows[entry["row"]]) for entry in kept]


def _check_hardware(report: Path, hardware: str) -> None:
    try:
        before = json.loads((report / "numbers.json").read_text(encoding="utf-8"))["hardware"]
    except FileNotFoundError:
        return
    if before != hardware:
        raise ConfigError(f"{report} holds figures of {before}; this is {hardware}. Give another folder to --report.")


def _parse_rows(text: str, known: Sequence[str]) -> list[str]:
    names = list(known) if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ConfigError(f"--rows is {text!r}: give all, or some of {', '.join(known)}, with commas between.")
    return names


def _check_device(device: str) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vLLM is imported first
    from vllm.platforms import current_platform

    if (device == "cpu") != current_platform.is_cpu():
        raise ConfigError(
            f"--device is {device}, but the vLLM installed here runs on {current_platform.device_type or 'nothing'}. "
            "Choose the other device, or install the other build (extras cpu and gpu in pyproject.toml)."
        )


def _write_report(folder: Path, figures: dict[str, Any], results: list[Result], title: str) -> None:
    _write_json(folder / "numbers.json", figures)
    commands = dict.fromkeys(entry["command"] for entry in figures["rows"])
    heading = f"{figures['hardware']}; {', '.join(f'`{command}`' for command in commands)}\n\n"
    (folder / "table.md").write_text(heading + build_markdown(results), encoding="utf-8")
    draw(results, f"{title}, {figures['hardware']}", folder / "table.png")
    _stage(f"report: {folder}")


def _write_json(path: Path, figures: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _stage(text: str) -> None:
    typer.echo(f"bench: {text}", err=True)
