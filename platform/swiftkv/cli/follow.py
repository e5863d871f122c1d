"""The live view of a run: a bar, and the figures of its last line of progress.

Does not stop anything: leaving it is the caller's.
Called by: cli/distill.py. Calls: jobs.py, distill/progress.py.
"""

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from swiftkv.distill.progress import Progress, parse_progress
from swiftkv.errors import ClusterError, TrainingError
from swiftkv.jobs import JobServer, follow_job

_SAID_BY_RUN = ("distill ", "distilled:", "stopped:", "rows:")
"""What lines of a run's log begin with that are for people."""


def follow_run(cluster: JobServer, job_id: str) -> None:
    """Show a job's progress until it ends.

    Raises: TrainingError with what the run said was wrong; ClusterError with the last lines of its log if it died
    without a word.
    """
    bar = Bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    task = bar.add_task(f"distilling ({job_id})", total=None)
    console = Console(stderr=True)
    problem: list[str] = []
    try:
        with Live(bar, console=console, refresh_per_second=4) as live:
            for line in follow_job(cluster, job_id):
                progress = parse_progress(line)
                if progress is not None:
                    bar.update(task, completed=progress.step, total=progress.steps)
                    live.update(Group(bar, _build_table(progress)))
                elif line.startswith(_SAID_BY_RUN):
                    console.print(line, highlight=False, markup=False, soft_wrap=True)
                elif line.startswith("error: ") or (problem and line.startswith("  ")):
                    problem.append(line.removeprefix("error: "))
    except ClusterError as error:
        raise TrainingError("\n".join(problem)) if problem else error from None


def _build_table(progress: Progress) -> Table:
    minutes, seconds = divmod(round(progress.remaining_s), 60)
    figures = {
        "loss": f"{progress.loss:.4f}",
        "KL": f"{progress.logits_kl:.4f}",
        "hidden": f"{progress.hidden_loss:.4f}",
        "gradient": f"{progress.gradient_norm:.3f}",
        "learning rate": f"{progress.learning_rate:.2e}",
        "tokens/s": f"{progress.tokens_per_s:,.0f}",
        "memory": f"{progress.memory_gib:.1f} GiB",
        "left": f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}",
    }
    table = Table(*figures, box=None, pad_edge=False)
    table.add_row(*figures.values())
    return table
