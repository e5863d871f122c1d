"""Scores one student of the quality table and its teacher on the held-out items, before and after distillation.

Called by: run.py, or by hand: `python scores.py --corpus DIR --student FOLDER --output FILE`.
Calls: swiftkv.evaluate.tasks.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from swiftkv.evaluate.tasks import TaskScore, compare_answers, compare_matches, score_task
from swiftkv.model.checkpoint import load_student, load_tokenizer
from swiftkv.model.convert import initialise_student
from swiftkv.model.modeling import SwiftKVForCausalLM

NEW_TOKENS = {"wikisql": 96, "spider": 208}
"""Corpora whose answers are scored, and the most tokens of an answer; no right query is as long. The others' answers,
which so small a teacher cannot give, count where answers are only compared."""
CORPORA = (*NEW_TOKENS, "qmsum", "squality", "thealgorithms")


def main() -> int:
    """Score, and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--corpus", "--student", "--output"):
        parser.add_argument(name, type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    corpora = {name: load_items(arguments.corpus / name / "heldout.jsonl") for name in CORPORA}
    figures = score_student(arguments.student, corpora, arguments.output.with_name("teacher.json"))
    arguments.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def load_items(path: Path) -> list[dict[str, str]]:
    """Held-out items of one corpus."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def score_student(folder: Path, corpora: dict[str, list[dict[str, str]]], teacher_file: Path) -> dict[str, Any]:
    """Figures of the teacher, and of the student after and before distillation, by corpus and over all.

    The teacher's own scores, the same for every student, are read from `teacher_file` once they are there.
    """
    model, tokenizer = load_student(folder), load_tokenizer(folder)
    if teacher_file.exists():
        kept = json.loads(teacher_file.read_text(encoding="utf-8"))
        teacher = {name: TaskScore(**values | {"matches": tuple(values["matches"])}) for name, values in kept.items()}
    else:
        teacher = _score_tasks(model, tokenizer, corpora, "teacher", teacher=True)
        teacher_file.write_text(json.dumps({name: asdict(score) for name, score in teacher.items()}), encoding="utf-8")
    figures: dict[str, Any] = {"teacher": {name: _describe(score) for name, score in teacher.items()}}
    all_items = [item for items in corpora.values() for item in items]
    for kind in ("after", "before"):
        if kind == "before":
            initialise_student(model)
        scores = _score_tasks(model, tokenizer, corpora, kind, teacher=False)
        figures[kind] = {"answers": asdict(compare_answers(model, tokenizer, all_items))} | {
            name: _describe(score) | {"difference": asdict(compare_matches(teacher[name], score))}
            for name, score in scores.items()
        }
    return figures


def _score_tasks(
    model: SwiftKVForCausalLM, tokenizer: Any, corpora: dict[str, list[dict[str, str]]], title: str, teacher: bool
) -> dict[str, TaskScore]:
    names = track(list(NEW_TOKENS), title, console=Console(stderr=True))
    return {name: score_task(model, tokenizer, corpora[name], NEW_TOKENS[name], teacher) for name in names}


def _describe(score: TaskScore) -> dict[str, Any]:
    values = asdict(score)
    del values["matches"]
    return values


if __name__ == "__main__":
    sys.exit(main())
