"""`swiftkv distill`: submits jobs/distill.py as a Ray job and shows its progress.

Checks the recipe before a cluster is started. Called by: cli/main.py. Calls: cluster.py, jobs.py.
"""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from swiftkv.cluster import Cluster, find_cluster, start_cluster, stop_cluster
from swiftkv.errors import ConfigError

SCRIPT = Path("jobs/distill.py")


def distill(
    recipe: Annotated[Path, typer.Argument(help="YAML file, see jobs/recipes/.", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="Folder of the run.  [default: runs/<recipe>]")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the recipe.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and end.")] = False,
) -> None:
    """Distill a student from a teacher, as a Ray job on this machine."""
    from swiftkv.distill.recipe import load_recipe, parse_overrides

    overrides = overrides or []
    resolved = load_recipe(recipe, parse_overrides(overrides))
    if dry_run:
        import yaml

        typer.echo(yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False))
        return
    from swiftkv.distill.inputs import check_inputs, check_run_folder

    run_folder = (output or Path("runs") / recipe.stem).absolute()
    check_inputs(resolved)
    check_run_folder(run_folder)
    if not SCRIPT.is_file():
        raise ConfigError(f"{SCRIPT}: no such file here. Run swiftkv distill from the checkout's folder.")
    arguments = [str(recipe.absolute()), "--output", str(run_folder)]
    for assignment in overrides:
        arguments += ["--set", assignment]
    command = shlex.join([sys.executable, str(SCRIPT.absolute()), *arguments])
    num_cpus = max(1, round(resolved.workers.num_workers * resolved.workers.cpus_per_worker))
    with _use_cluster(num_cpus) as cluster:
        _follow(cluster, f"cd {shlex.quote(str(Path.cwd()))} && {command}")


@contextmanager
def _use_cluster(num_cpus: int) -> Iterator[Cluster]:
    """The own cluster that is running, or one for this command alone."""
    cluster = find_cluster()
    if cluster is not None:
        typer.echo("using the Ray cluster that is running; the job waits until enough of its CPUs are free", err=True)
        yield cluster
        return
    typer.echo("starting a Ray cluster", err=True)
    cluster = start_cluster(num_cpus=num_cpus)
    try:
        yield cluster
    finally:
        stop_cluster(cluster)


def _follow(cluster: Cluster, command: str) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from swiftkv.distill.progress import parse_progress
    from swiftkv.jobs import follow_job, stop_job, submit_job

    job_id = submit_job(cluster, command)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, TextColumn("{task.fields[figures]}"), console=console) as bar:
        task = bar.add_task("distilling", total=None, figures=f"job {job_id}")
        try:
            for line in follow_job(cluster, job_id):
                progress = parse_progress(line)
                if progress is not None:
                    figures = f"loss {progress.loss:.4f}  {progress.tokens_per_s:,.0f} tokens/s"
                    bar.update(task, completed=progress.step, total=progress.steps, figures=figures)
                elif line.startswith(("distill ", "distilled:")):
                    bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            stop_job(cluster, job_id)
            raise
