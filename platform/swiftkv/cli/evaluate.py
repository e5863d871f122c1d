"""`swiftkv evaluate`: a student against its teacher on held-out text.

Called by: cli/main.py. Calls: evaluate/compare.py.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swiftkv.errors import ConfigError

if TYPE_CHECKING:
    from swiftkv.evaluate.compare import Comparison


def evaluate(
    folder: Annotated[Path, typer.Argument(help="Folder of a SwiftKV checkpoint.", show_default=False)],
    data: Annotated[list[Path], typer.Option(help="Held-out JSONL; may be given again.", show_default=False)],
    text_column: Annotated[str, typer.Option(help="Key of the text in each record.")] = "text",
    row_tokens: Annotated[int, typer.Option(help="Tokens per row.", min=2)] = 512,
    max_rows: Annotated[int, typer.Option(help="Rows scored at the most.", min=1)] = 64,
    provenance: Annotated[
        Path | None, typer.Option(help="The run's provenance.json, to which the figures are added.")
    ] = None,
) -> None:
    """Perplexity, agreement and KL of a student against its teacher, before and after distillation."""
    if provenance is not None and not provenance.is_file():
        raise ConfigError(f"{provenance}: no such file. Give the provenance.json of the run's folder, or none.")
    from swiftkv.model.checkpoint import load_student, load_tokenizer
    from swiftkv.model.convert import initialise_student
    from swiftkv.text import build_rows, choose_evenly

    rows = choose_evenly(build_rows(load_tokenizer(folder), data, text_column, row_tokens), max_rows)
    student = load_student(folder)
    after = _compare(student, rows, "after distillation")
    initialise_student(student)
    before = _compare(student, rows, "before distillation")
    _print_table(before, after)
    if provenance is not None:
        content = json.loads(provenance.read_text(encoding="utf-8"))
        content["evaluation"] = summarise(before, after)
        provenance.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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
