"""The folder of a run: what lies where, and whether a run can begin, go on or be stopped there.

    recipe.yaml         as resolved; written when the run begins
    run.json            the run's id, and which rows it reads
    train/              checkpoints, while it runs (or in the recipe's storage)
    starts.txt          each start of the workers: by which job, and when
    curve.jsonl, .png   loss, its parts, learning rate and gradient norm of every step
    tensorboard/        the same for TensorBoard
    stop-requested      somebody asked the run to end
    diverged-batch.npz  the rows of a step whose loss could not be trusted, which ended the run
    final/              the student: a run that has it has ended
    provenance.json     where the student comes from; the registry's manifest takes it over

Imports nothing heavy.
Called by: cli/distill.py, jobs/distill.py, distill/run.py, distill/worker.py, distill/records.py.
"""

import json
import uuid
from datetime import UTC, datetime
from pathlib import Path

from swiftkv.errors import ConfigError, DataError

RECIPE_FILE = "recipe.yaml"
RUN_FILE = "run.json"
DIVERGED_FILE = "diverged-batch.npz"
CHECKPOINTS = "train"
STARTS_FILE = "starts.txt"
CURVE_FILE = "curve.jsonl"
STOP_FILE = "stop-requested"
FINAL = "final"
PROVENANCE_FILE = "provenance.json"


def check_run_folder(run_folder: Path) -> None:
    """Raises: ConfigError if a run has begun in this folder already."""
    if (run_folder / FINAL).exists():
        raise ConfigError(f"{run_folder}: a run has ended here already. Choose another --output.")
    if (run_folder / RECIPE_FILE).exists():
        raise ConfigError(
            f"{run_folder}: a run has begun here already. Go on with it (swiftkv distill --resume {run_folder}), look "
            "at it with --follow if it is going on, or choose another --output."
        )


def check_resumed(run_folder: Path) -> None:
    """Raises: ConfigError if no run has begun in this folder, or it has ended."""
    if not (run_folder / RECIPE_FILE).is_file():
        raise ConfigError(f"{run_folder}: no run has begun here. Begin one with: swiftkv distill RECIPE")
    if (run_folder / FINAL).exists():
        raise ConfigError(f"{run_folder}: this run has ended; its student is in {run_folder / FINAL}.")
    if (run_folder / DIVERGED_FILE).exists():
        raise ConfigError(
            f"{run_folder}: this run diverged, and would again at the same step; its batch is in {DIVERGED_FILE}. "
            "Begin another run, with a lower training.learning_rate or without those rows."
        )


def request_stop(run_folder: Path) -> None:
    """Ask the run to save a checkpoint at its next step and end.

    Raises: ConfigError if no run has begun in this folder, or it has ended.
    """
    check_resumed(run_folder)
    (run_folder / STOP_FILE).touch()


def begin_run(run_folder: Path) -> None:
    """Make the folder a run's own, with an id that no other run has.

    Raises: ConfigError if a run has begun in this folder already, be it at the same moment.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    try:
        with (run_folder / RUN_FILE).open("x", encoding="utf-8") as file:
            json.dump({"id": uuid.uuid4().hex[:12]}, file)
    except FileExistsError:
        raise ConfigError(f"{run_folder}: a run has begun here already. Choose another --output.") from None


def read_run_id(run_folder: Path) -> str:
    """What tells the run from others of its name."""
    return str(json.loads((run_folder / RUN_FILE).read_text(encoding="utf-8"))["id"])


def keep_rows(run_folder: Path, rows: str) -> None:
    """Note which prepared rows the run reads, when it begins.

    Raises: DataError if it began with others: the steps before and after would not belong together.
    """
    file = run_folder / RUN_FILE
    noted = json.loads(file.read_text(encoding="utf-8"))
    if noted.setdefault("rows", rows) != rows:
        raise DataError(
            f"{run_folder}: the documents, the tokenizer or the way rows are made have changed since this run began. "
            "Bring them back, or begin another run."
        )
    file.write_text(json.dumps(noted), encoding="utf-8")


def note_start(run_folder: Path, job: str) -> int:
    """Note that the workers start; how many starts so far came after another of the same job.

    Those are Ray Train's, after a failure or as another number of workers. A run that is resumed has another job.
    """
    file = run_folder / STARTS_FILE
    with file.open("a", encoding="utf-8") as starts:
        starts.write(f"{job} {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}\n")
    return count_restarts(run_folder)


def count_restarts(run_folder: Path) -> int:
    """Times that Ray Train has started the run's workers again."""
    lines = (run_folder / STARTS_FILE).read_text(encoding="utf-8").splitlines()
    return len(lines) - len({line.partition(" ")[0] for line in lines})
