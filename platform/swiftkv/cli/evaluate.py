"""`swiftkv evaluate`: a student against its teacher on held-out text, in tasks, and at a gate.

Called by: cli/main.py. Calls: evaluate/compare.py, cli/tasks.py, evaluate/gates.py, registry/registry.py.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swiftkv.cli.registry import Store, build_table, load_provenance, open_registry, print_table, show_progress
from swiftkv.config import load_yaml
from swiftkv.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from swiftkv.evaluate.compare import Comparison
    from swiftkv.evaluate.harness import Harness
    from swiftkv.registry.evaluations import GateResult


@dataclass(frozen=True)
class _Subject:
    """What is evaluated, and where its figures are kept."""

    folder: Path
    recorded_teacher: str | None
    """Folder or name, as the run recorded it."""
    keep: "Callable[[dict[str, Any], GateResult | None], str]"
    """Returns where they are now."""


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="FOLDER|NAME[@VERSION]", help="A SwiftKV checkpoint.", show_default=False)
    ],
    data: Annotated[
        list[Path] | None, typer.Option(help="Held-out JSONL; may be given again.", show_default=False)
    ] = None,
    text_column: Annotated[str, typer.Option(help="Key of the text in each record.")] = "text",
    row_tokens: Annotated[int, typer.Option(help="Tokens per row.", min=2)] = 512,
    max_rows: Annotated[int, typer.Option(help="Rows scored at the most.", min=1)] = 64,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, with commas between.")] = None,
    task_folder: Annotated[Path | None, typer.Option(help="More task files (YAML), as of one's own data.")] = None,
    limit: Annotated[int | None, typer.Option(help="Items of each task; all if not given.", min=1)] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in each prompt.", show_default="the task's")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the chat template.")] = False,
    teacher: Annotated[
        Path | None, typer.Option(help="Of the tasks: its folder, or its name on the hub.", show_default="as recorded")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Where the model is served (…/v1); it is served here if not given.")
    ] = None,
    teacher_endpoint: Annotated[str | None, typer.Option(help="Where the teacher is served, likewise.")] = None,
    eager: Annotated[bool, typer.Option("--eager", help="Serve here without compiling.")] = False,
    seed: Annotated[int, typer.Option(help="Of the tasks' choices.")] = 0,
    gate: Annotated[
        Path | None,
        typer.Option(help="YAML of limits, such as jobs/gates/held-out.yaml; exit status 1 if one is missed."),
    ] = None,
    provenance: Annotated[
        Path | None, typer.Option(help="Of a folder: the run's provenance.json, to which the figures are added.")
    ] = None,
    store: Store = None,
) -> None:
    """A student against its teacher: perplexity, agreement and KL on held-out text, and tasks; a gate's verdict.

    Tasks whose answers are generated are asked through the endpoint, as people are served.

    The figures of a published version are kept beside it, and `swiftkv promote` asks for the gate's verdict.
    """
    from swiftkv.evaluate.gates import Gate

    if not data and tasks is None:
        raise ConfigError("nothing to measure: give --data, --tasks, or both.")
    limits = None if gate is None else load_yaml(gate, Gate)
    harness = None if tasks is None else _open_harness(tasks, task_folder, limit, num_fewshot, seed, chat)
    subject = _find_subject(model, provenance, store)
    teacher_folder = None if harness is None else _find_teacher(teacher, subject)
    figures = _compare_held_out(subject.folder, data, text_column, row_tokens, max_rows) if data else {}
    if harness is not None and teacher_folder is not None:
        from swiftkv.cli.tasks import score_tasks

        scores = score_tasks(harness, subject.folder, teacher_folder, endpoint, teacher_endpoint, eager)
        _print_scores(scores["tasks"])
        figures |= scores
    verdict = None if limits is None else limits.judge(figures)
    if verdict is not None:
        _print_verdict(verdict)
    typer.echo(subject.keep(figures, verdict))
    if verdict is not None and not verdict.passed:
        raise typer.Exit(1)


def _find_subject(model: str, provenance: Path | None, store: str | None) -> _Subject:
    folder = Path(model).expanduser()
    if folder.is_dir() or "/" in model:
        if provenance is not None and not provenance.is_file():
            raise ConfigError(f"{provenance}: no such file. Give the provenance.json of the run's folder, or none.")
        if provenance is None:
            return _Subject(folder, None, lambda figures, verdict: "kept nowhere: give --provenance to publish them")
        from swiftkv.registry.measured import hash_student

        recorded, measured = load_provenance(provenance).teacher or {}, hash_student(folder)
        return _Subject(
            folder,
            _read_text(recorded.get("folder")),
            lambda figures, verdict: _keep_in_file(folder, measured, provenance, figures, verdict),
        )
    if provenance is not None:
        raise ConfigError("--provenance is of a folder; the figures of a published version are kept beside it.")
    registry = open_registry(store)
    with show_progress(f"verifying {model}") as on_progress:
        fetched = registry.fetch(model, on_progress)
    reference = f"{fetched.name}@{fetched.version}"

    def keep(figures: dict[str, Any], verdict: "GateResult | None") -> str:
        registry.add_evaluation(reference, figures, verdict)
        return f"kept beside {reference} in {registry.location}"

    return _Subject(fetched.path, _read_text((fetched.manifest.teacher or {}).get("folder")), keep)


def _read_text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _keep_in_file(
    folder: Path, measured: str, provenance: Path, figures: dict[str, Any], verdict: "GateResult | None"
) -> str:
    from swiftkv.registry.measured import HASH_KEY, hash_student

    if hash_student(folder) != measured:
        raise CheckpointError(f"{folder}: changed while it was measured. Evaluate it again.")
    content = json.loads(provenance.read_text(encoding="utf-8"))
    figures = figures | {HASH_KEY: measured}
    content["evaluation"] = figures | ({} if verdict is None else {"gate": verdict.model_dump(mode="json")})
    provenance.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return f"kept in {provenance}"


def _compare_held_out(
    folder: Path, data: list[Path], text_column: str, row_tokens: int, max_rows: int
) -> dict[str, Any]:
    from swiftkv.model.checkpoint import load_student, load_tokenizer
    from swiftkv.model.convert import initialise_student
    from swiftkv.text import build_rows, choose_evenly

    rows = choose_evenly(build_rows(load_tokenizer(folder), data, text_column, row_tokens), max_rows)
    student = load_student(folder)
    after = _compare(student, rows, "after distillation")
    initialise_student(student)
    before = _compare(student, rows, "before distillation")
    _print_table(before, after)
    return summarise(before, after)


def _open_harness(
    tasks: str, task_folder: Path | None, limit: int | None, num_fewshot: int | None, seed: int, chat: bool
) -> "Harness":
    from swiftkv.evaluate.harness import Harness, TaskSettings

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    if not names:
        raise ConfigError("--tasks names none. Give names of lm-eval's tasks, with commas between.")
    return Harness(TaskSettings(names, task_folder, limit, num_fewshot, seed, chat))


def _find_teacher(teacher: Path | None, subject: _Subject) -> Path:
    from swiftkv.distill.teachers import resolve_teacher

    if teacher is None and subject.recorded_teacher is None:
        raise ConfigError("--tasks compares with the teacher, which nothing here names: give --teacher.")
    return resolve_teacher(teacher or Path(str(subject.recorded_teacher)))


def _print_scores(tasks: dict[str, dict[str, dict[str, float]]]) -> None:
    table = build_table("task", "metric", "student", "teacher", "student, engine without skipping")
    for name, models in tasks.items():
        for metric in models["student"]:
            if "_stderr" not in metric:
                values = [models.get(who, {}).get(metric) for who in ("student", "teacher", "student_without_skipping")]
                table.add_row(name, metric, *("" if value is None else f"{value:.4g}" for value in values))
    print_table(table)


def _print_verdict(verdict: "GateResult") -> None:
    table = build_table(f"gate {verdict.gate}: {'passed' if verdict.passed else 'NOT PASSED'}", "found", "")
    for limit in verdict.limits:
        found = "not measured" if limit.found is None else f"{limit.found:.4g}"
        table.add_row(limit.limit, found, "passed" if limit.passed else "MISSED")
    print_table(table)


def summarise(before: "Comparison", after: "Comparison") -> dict[str, Any]:
    """The figures as the registry's manifest records them."""
    return {
        "held_out_positions": after.positions,
        "teacher_perplexity": after.teacher_perplexity,
        "student_before": {key: asdict(before)[key] for key in ("student_perplexity", "agreement_frac", "kl_nats")},
        "student_after": {key: asdict(after)[key] for key in ("student_perplexity", "agreement_frac", "kl_nats")},
    }


def _compare(student: Any, rows: Any, title: str) -> "Comparison":
    from rich.console import Console
    from rich.progress import track

    from swiftkv.evaluate.compare import compare_with_teacher, split_batches

    batches = track(split_batches(rows, student.config.vocab_size), title, console=Console(stderr=True))
    return compare_with_teacher(student, batches)


def _print_table(before: "Comparison", after: "Comparison") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "perplexity", "agreement", "KL (nats)", title=f"held-out, {after.positions:,} positions")
    table.add_row("teacher", f"{after.teacher_perplexity:.2f}", "", "")
    for title, entry in (("student before", before), ("student after", after)):
        table.add_row(title, f"{entry.student_perplexity:.2f}", f"{entry.agreement_frac:.1%}", f"{entry.kl_nats:.4f}")
    Console().print(table)
