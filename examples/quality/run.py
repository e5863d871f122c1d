"""The quality table: a teacher trained on real tasks, and what each cut and group size costs it, before and after.

    python examples/quality/run.py --data FOLDER

takes three to four hours on two CPU cores. FOLDER holds the task data (see corpus.py); what is done already in the
output folder is not done again, so a run that was stopped goes on. Everything after the teacher is the product's own
journey: `swiftkv distill`, then the scores of evaluate/tasks.py.
Calls: corpus.py, teacher.py, scores.py, table.py, the `swiftkv` command.
"""

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from table import describe_folder, write_table

from swiftkv.errors import ConfigError, SwiftKVError

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
RECIPE = "jobs/recipes/quality-half-laptop.yaml"


@dataclass(frozen=True)
class TableRow:
    """One student of the table."""

    name: str
    num_key_value_layers: int
    key_value_group_size: int


ROWS = (
    TableRow("25% skipped", 6, 1),
    TableRow("50% skipped", 4, 1),
    TableRow("62.5% skipped", 3, 1),
    TableRow("50%, groups of 2", 4, 2),
    TableRow("50%, groups of 4", 4, 4),
)


def main() -> int:
    """Exit status: 0, or 2 with one message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the task data")
    parser.add_argument("--output", type=Path, default=CHECKOUT / ".swiftkv" / "quality", help="where all is kept")
    parser.add_argument("--report", type=Path, help="folder of the table; default: <output>/report")
    parser.add_argument("--teacher-steps", type=int, help="optimizer steps of the teacher's training; default: its own")
    parser.add_argument("--steps", type=int, help="optimizer steps of each distillation; default: the recipe's")
    arguments = parser.parse_args()
    try:
        run(arguments.data, arguments.output, arguments.teacher_steps, arguments.steps)
        folder, names = arguments.report or arguments.output / "report", [row.name for row in ROWS]
        write_table(arguments.output, names, folder, describe_command(arguments.teacher_steps, arguments.steps))
    except subprocess.CalledProcessError as error:
        print(f"\nquality: failed at: {shlex.join(map(str, error.cmd))}", file=sys.stderr)
        return error.returncode or 1
    except SwiftKVError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def describe_command(teacher_steps: int | None, steps: int | None) -> str:
    """What measures the table again, without this machine's paths."""
    given = {"--teacher-steps": teacher_steps, "--steps": steps}
    options = "".join(f" {option} {value}" for option, value in given.items() if value is not None)
    return f"python examples/quality/run.py --data FOLDER{options}"


def run(data: Path, output: Path, teacher_steps: int | None, steps: int | None) -> None:
    """All steps whose results are not there yet."""
    corpus, teacher = output / "corpus", output / "teacher" / "teacher"
    if not (corpus / "summary.json").exists():
        _call([sys.executable, HERE / "corpus.py", "--data", data, "--output", corpus])
    if not teacher.exists():
        command = [sys.executable, HERE / "teacher.py", "--corpus", corpus, "--output", teacher.parent]
        own_steps: list[object] = [] if teacher_steps is None else ["--steps", teacher_steps]
        _call([*command, *own_steps, "--resume"])
    trained = json.loads((teacher.parent / "summary.json").read_text(encoding="utf-8"))["num_steps"]
    if teacher_steps not in (None, trained):
        raise ConfigError(
            f"--teacher-steps {teacher_steps}: {teacher} took {trained}. Give those, or another --output."
        )
    for row in ROWS:
        folder = output / "runs" / describe_folder(row.name)
        _distill(row, folder, corpus, teacher, steps)
        scores = output / "scores" / f"{row.name}.json"
        if not scores.exists():
            _call(
                [
                    sys.executable,
                    HERE / "scores.py",
                    "--corpus",
                    corpus,
                    "--teacher",
                    teacher,
                    "--student",
                    folder / "final",
                    "--output",
                    scores,
                ]
            )


def _distill(row: TableRow, folder: Path, corpus: Path, teacher: Path, steps: int | None) -> None:
    swiftkv = [sys.executable, "-m", "swiftkv.cli", "distill"]
    if (folder / "final").exists():
        return
    if (folder / "recipe.yaml").exists():
        _call([*swiftkv, "--resume", folder])
        return
    sources = [f"{{files: [{file}], format: pair}}" for file in sorted(corpus.glob("*/train.jsonl"))]
    values = {
        "teacher": teacher,
        "data.train": f"[{', '.join(sources)}]",
        "cut.num_key_value_layers": row.num_key_value_layers,
        "cut.key_value_group_size": row.key_value_group_size,
    }
    if steps is not None:
        values["training.steps"] = steps
    _call(
        [*swiftkv, RECIPE, "--output", folder, *(word for key in values for word in ("--set", f"{key}={values[key]}"))]
    )


def _call(command: list[object]) -> None:
    words = [str(word) for word in command]
    print(f"quality: {shlex.join(words[1:])}", flush=True)
    subprocess.run(words, cwd=CHECKOUT, check=True)


if __name__ == "__main__":
    sys.exit(main())
