"""Scores one student of the quality table and its teacher on the held-out items, before and after distillation.

Called by: run.py, or by hand: `python scores.py --corpus DIR --teacher FOLDER --student FOLDER --output FILE`.
Calls: swiftkv.evaluate.tasks, on engines in float32: the teacher's is unmodified, the student's skips.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.progress import track

from swiftkv.engine.llm import run_engine
from swiftkv.engine.settings import EngineSettings
from swiftkv.evaluate.tasks import Item, TaskScore, compare_answers, compare_matches, generate_answers, score_answers
from swiftkv.model.checkpoint import load_student, load_tokenizer, save_student
from swiftkv.model.convert import initialise_student

Corpora = dict[str, list[Item]]

NEW_TOKENS = {"wikisql": 96, "spider": 208}
"""Corpora whose answers are scored, and the most tokens of an answer; no right query is as long. The others' answers,
which so small a teacher cannot give, count where answers are only compared."""
CORPORA = (*NEW_TOKENS, "qmsum", "squality", "thealgorithms")


ENGINE = EngineSettings(dtype="float32", max_num_seqs=64, max_num_batched_tokens=4096, kv_cache_gib=2.0)
"""In float32, as the weights are: a query that differs in one rounding is another query."""


def main() -> int:
    """Score, and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--corpus", "--teacher", "--student", "--output"):
        parser.add_argument(name, type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    corpora = {name: load_items(arguments.corpus / name / "heldout.jsonl") for name in CORPORA}
    teacher = score_teacher(arguments.teacher, corpora, arguments.output.with_name("teacher.json"))
    figures = score_student(arguments.student, corpora, teacher)
    arguments.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def load_items(path: Path) -> list[Item]:
    """Held-out items of one corpus."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def score_teacher(folder: Path, corpora: Corpora, kept: Path) -> dict[str, TaskScore]:
    """The teacher's scores by corpus, the same for every student: from the file `kept`, once it is there."""
    if not kept.exists():
        scores = _score_tasks(folder, corpora, "teacher")
        kept.write_text(json.dumps({name: asdict(score) for name, score in scores.items()}), encoding="utf-8")
    values = json.loads(kept.read_text(encoding="utf-8"))
    return {name: TaskScore(**score | {"matches": tuple(score["matches"])}) for name, score in values.items()}


def score_student(folder: Path, corpora: Corpora, teacher: dict[str, TaskScore]) -> dict[str, Any]:
    """Figures of the teacher, and of the student after and before distillation, by corpus and over all."""
    model, tokenizer = load_student(folder), load_tokenizer(folder)
    all_items = [item for items in corpora.values() for item in items]
    figures: dict[str, Any] = {"teacher": {name: _describe(score) for name, score in teacher.items()}}
    with TemporaryDirectory(prefix="quality-") as untrained:
        for kind, scored in (("after", folder), ("before", Path(untrained))):
            if kind == "before":
                initialise_student(model)
                save_student(model, scored, folder)
            figures[kind] = {"answers": asdict(compare_answers(model, tokenizer, all_items))} | {
                name: _describe(score) | {"difference": asdict(compare_matches(teacher[name], score))}
                for name, score in _score_tasks(scored, corpora, kind).items()
            }
    return figures


def _score_tasks(folder: Path, corpora: Corpora, title: str) -> dict[str, TaskScore]:
    tokenizer, scores = load_tokenizer(folder), {}
    with run_engine(folder, ENGINE) as llm:
        for name in track(NEW_TOKENS, title, console=Console(stderr=True)):
            prompts = [item["prompt"] for item in corpora[name]]
            scores[name] = score_answers(generate_answers(llm, tokenizer, prompts, NEW_TOKENS[name]), corpora[name])
    return scores


def _describe(score: TaskScore) -> dict[str, Any]:
    values = asdict(score)
    del values["matches"]
    return values


if __name__ == "__main__":
    sys.exit(main())
