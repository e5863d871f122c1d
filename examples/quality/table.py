"""The quality table as Markdown, picture and JSON, from the scores of its rows. Called by: run.py."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from swiftkv.bench.pairs import describe_processor
from swiftkv.distill.recipe import load_recipe

EXACT = ("wikisql", "spider")
BEFORE_COLOUR, AFTER_COLOUR, TEACHER_COLOUR = "#d1a23b", "#2f6fde", "#8a8f98"


def write_table(output: Path, names: list[str], folder: Path, command: str) -> None:
    """Write table.md, table.png and numbers.json to `folder`, and print the table. `command` measures it again."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = {name: json.loads((output / "scores" / f"{name}.json").read_text(encoding="utf-8")) for name in names}
    training = load_recipe(output / "runs" / describe_folder(names[0]) / "recipe.yaml").training
    settings = f"{training.steps} steps of {training.rows_per_step} rows, seed {training.seed}"
    heading = f"{describe_processor()}; `{command}`; {settings}\n\n"
    numbers = {
        "hardware": describe_processor(),
        "command": command,
        "training": training.model_dump(),
        "corpus": json.loads((output / "corpus" / "summary.json").read_text(encoding="utf-8")),
        "teacher": json.loads((output / "teacher" / "summary.json").read_text(encoding="utf-8")),
        "scores": scores,
    }
    (folder / "numbers.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    table = build_table(scores)
    (folder / "table.md").write_text(heading + table, encoding="utf-8")
    draw(scores, folder / "table.png")
    print(table)


def describe_folder(row: str) -> str:
    """The name of a row's run folder."""
    return row.replace("%", "").replace(",", "").replace(" ", "-")


def build_table(scores: dict[str, Any]) -> str:
    """Rows: the teacher, and each student before and after; columns: the measures."""
    titles = ["", "perplexity", "agreement", "KL (nats)", *(f"{name}, exact" for name in EXACT)]
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    first = next(iter(scores.values()))
    perplexity = first["after"]["answers"]["teacher_perplexity"]
    lines.append(_format_line("teacher", [f"{perplexity:.3f}", "", ""], first["teacher"], first["teacher"]))
    for kind in ("before", "after"):
        for name, row in scores.items():
            answers = row[kind]["answers"]
            measures = [
                f"{answers['student_perplexity']:.3f}",
                f"{answers['agreement_frac']:.2%}",
                f"{answers['kl_nats']:.4f}",
            ]
            lines.append(_format_line(f"{name}, {kind}", measures, row[kind], row["teacher"]))
    return "\n".join(lines) + "\n"


def _format_line(title: str, measures: list[str], row: dict[str, Any], teacher: dict[str, Any]) -> str:
    cells = [title, *measures]
    for name in EXACT:
        score = f"{row[name]['exact_match_frac']:.1%}"
        if row is not teacher:
            error = row[name]["difference"]["standard_error_frac"]
            score += f" ({row[name]['difference']['difference_frac'] * 100:+.1f} ± {error * 100:.1f})"
        cells.append(score)
    return f"| {' | '.join(cells)} |"


def draw(scores: dict[str, Any], path: Path) -> None:
    """Exact match and perplexity of every student before and after, beside the teacher's."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8))
    names = list(scores)
    panels: list[tuple[str, Any, Any]] = [
        (f"{task}: exact match", lambda row, kind, task=task: row[kind][task]["exact_match_frac"], task)
        for task in EXACT
    ]
    panels.append(("perplexity of the answers", lambda row, kind: row[kind]["answers"]["student_perplexity"], None))
    for axis, (title, measure, task) in zip(axes, panels, strict=True):
        for offset, kind, colour in ((-0.2, "before", BEFORE_COLOUR), (0.2, "after", AFTER_COLOUR)):
            values = [measure(scores[name], kind) for name in names]
            axis.bar([index + offset for index in range(len(names))], values, 0.4, color=colour, label=kind)
        first = scores[names[0]]
        level = (
            first["after"]["answers"]["teacher_perplexity"]
            if task is None
            else first["teacher"][task]["exact_match_frac"]
        )
        axis.axhline(level, color=TEACHER_COLOUR, linestyle="--", label="teacher")
        axis.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], rotation=30, fontsize=8)
        axis.set_title(title, fontsize=10)
    axes[-1].set_yscale("log")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
