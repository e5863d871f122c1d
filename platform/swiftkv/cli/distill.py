"""`swiftkv distill`: submits jobs/distill.py as a Ray job, shows how it comes along, stops it or goes on with it.

Checks the recipe before a cluster is started. Called by: cli/main.py. Calls: cluster, jobs.py, cli/follow.py.
"""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swiftkv.cluster import Cluster, RemoteCluster, find_cluster, start_cluster, stop_cluster
from swiftkv.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from swiftkv.distill.recipe import Recipe
    from swiftkv.jobs import JobServer

SCRIPT = Path("jobs/distill.py")


def distill(
    recipe: Annotated[Path | None, typer.Argument(help="YAML file, see jobs/recipes/.", show_default=False)] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run.  [default: runs/<recipe>]")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the recipe.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe, memory and time expected, and end.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="What --dry-run reckons with, such as h100-80gb.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Dashboard of another Ray cluster, such as http://head:8265.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show a run live; Ctrl-C leaves it running.")] = False,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with the run in this folder from its last checkpoint.")
    ] = None,
    stop: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Let the run in this folder save a checkpoint and end.")
    ] = None,
) -> None:
    """Distill a student from a teacher, as a Ray job on this machine or on another cluster.

    On this machine the command waits for the run; Ctrl-C lets it save a checkpoint and ends it.
    """
    if sum(choice is not None for choice in (recipe, resume, stop)) != 1:
        raise ConfigError("give one of: a recipe, --resume RUN or --stop RUN.")
    if recipe is None and (overrides or output or dry_run):
        raise ConfigError("--set, --output and --dry-run belong to a recipe; a run that has begun keeps its own.")
    if device is not None and not dry_run:
        raise ConfigError("--device is what --dry-run reckons with. Add --dry-run, or leave it out.")
    if address is not None and not dry_run and not (output or resume or stop or Path()).is_absolute():
        raise ConfigError(
            "on another cluster, give --output, --resume or --stop an absolute folder that its nodes see."
        )
    if dry_run and recipe is not None:
        resolved = _load(recipe, overrides)
        with _naming(recipe):
            if address is None and resolved.teacher.is_dir():
                _check_inputs(resolved)
            _print_plan(resolved, device)
    elif stop is not None:
        _stop(stop.absolute(), address)
    elif resume is not None:
        _check_resumed(resume.absolute(), address)
        _submit(["--resume", str(resume.absolute())], resume.absolute(), address, follow, num_cpus=None)
    elif recipe is not None:
        run_folder = (output or Path("runs") / recipe.stem).absolute()
        resolved = _load(recipe, overrides)
        if address is None and not (follow and _find_running(run_folder)):
            _check(recipe, resolved, run_folder)
        words = [str(recipe), "--output", str(run_folder)]
        words += [word for assignment in overrides or [] for word in ("--set", assignment)]
        workers = resolved.workers
        _submit(words, run_folder, address, follow, max(1, round(workers.num_workers * workers.cpus_per_worker)))


def _load(recipe: Path, overrides: list[str] | None) -> "Recipe":
    from swiftkv.distill.recipe import load_recipe, parse_overrides

    return load_recipe(recipe, parse_overrides(overrides or []))


@contextmanager
def _naming(recipe: Path) -> Iterator[None]:
    """Puts the recipe's file before what is wrong with what it asks for."""
    try:
        yield
    except (CheckpointError, ConfigError, DataError) as error:
        raise type(error)(f"{recipe}: {error}") from error


def _check(recipe: Path, resolved: "Recipe", run_folder: Path) -> None:
    """Everything that can be found wrong before a cluster or a GPU is taken.

    Of a teacher on the hub that is its config; the job looks at the rest before its workers start.
    """
    from swiftkv.distill.folder import check_run_folder
    from swiftkv.distill.teachers import load_teacher_spec

    check_run_folder(run_folder)
    with _naming(recipe):
        if resolved.teacher.is_dir():
            _check_inputs(resolved)
        else:
            spec = load_teacher_spec(resolved)
            typer.echo(f"{resolved.teacher}: {spec.shape.num_hidden_layers} layers; the job downloads it", err=True)


def _check_inputs(resolved: "Recipe") -> None:
    from swiftkv.distill.inputs import check_inputs  # torch and transformers are needed only here

    check_inputs(resolved)


def _check_resumed(run_folder: Path, address: str | None) -> None:
    if address is None:
        from swiftkv.distill.folder import check_resumed

        check_resumed(run_folder)


def _print_plan(resolved: "Recipe", device: str | None) -> None:
    import yaml
    from rich.console import Console
    from rich.table import Table

    from swiftkv.distill.estimate import check_fit, choose_device, estimate_run, format_estimate
    from swiftkv.distill.teachers import count_weight_bytes, load_teacher_config, load_teacher_spec

    typer.echo(yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False))
    device = device or choose_device(resolved)
    config = load_teacher_config(resolved.teacher)
    spec = load_teacher_spec(resolved, config)
    estimate = estimate_run(resolved, spec, device, weight_bytes=count_weight_bytes(config))
    table = Table("", f"estimated for {resolved.workers.num_workers} x {device}", box=None, pad_edge=False)
    for name, value in format_estimate(estimate):
        table.add_row(name, value)
    Console().print(table)
    check_fit(estimate)


def _find_running(run_folder: Path) -> str | None:
    from swiftkv.jobs import find_job

    cluster = find_cluster()
    return find_job(cluster, str(run_folder)) if cluster is not None else None


def _submit(words: list[str], run_folder: Path, address: str | None, follow: bool, num_cpus: int | None) -> None:
    from swiftkv.jobs import find_job, submit_job

    if not SCRIPT.is_file():
        raise ConfigError(f"{SCRIPT}: no such file here. Run swiftkv distill from the checkout's folder.")
    if address is not None:
        _submit_elsewhere(RemoteCluster(dashboard_url=address), words, run_folder, follow)
        return
    with _use_cluster(num_cpus) as (cluster, ours):
        job_id = find_job(cluster, str(run_folder))
        if job_id is not None and not follow:
            raise ConfigError(
                f"{run_folder}: this run is going on (job {job_id}). Look at it with --follow, or choose another "
                "--output."
            )
        if job_id is None:
            command = shlex.join([sys.executable, str(SCRIPT.absolute()), *words])
            job_id = submit_job(cluster, f"cd {shlex.quote(str(Path.cwd()))} && {command}", run=str(run_folder))
        _watch(cluster, job_id, run_folder, "", detaches=follow, ours=ours)


def _submit_elsewhere(cluster: "JobServer", words: list[str], run_folder: Path, follow: bool) -> None:
    """The checkout travels with the job, so paths are those of the checkout or of storage that every node sees."""
    from swiftkv.jobs import find_job, submit_job

    run = str(run_folder)
    job_id = find_job(cluster, run)
    if job_id is None:
        command = shlex.join(["python", str(SCRIPT), *words])
        job_id = submit_job(cluster, command, checkout=Path.cwd(), run=run)
    elif not follow:
        raise ConfigError(f"{run}: this run is going on there (job {job_id}). Look at it with --follow.")
    typer.echo(f"job {job_id} on {cluster.dashboard_url}")
    if follow:
        address = f" --address {cluster.dashboard_url}"
        _watch(cluster, job_id, run_folder, address, detaches=True, ours=False)


def _watch(cluster: "JobServer", job_id: str, run_folder: Path, address: str, *, detaches: bool, ours: bool) -> None:
    """Follow to the end. Ctrl-C leaves a run that is only looked at, and ends one that belongs to this command."""
    from swiftkv.cli.follow import follow_run

    try:
        follow_run(cluster, job_id)
    except KeyboardInterrupt:
        if detaches:
            command = f"swiftkv distill --stop {run_folder}{address}"
            typer.echo(f"\nthe run goes on. To save a checkpoint and end it: {command}", err=True)
            if ours:
                typer.echo("its cluster stays too, until: swiftkv down", err=True)
                raise _Detached from None
            return
        typer.echo(
            "\nsaving a checkpoint at the next step; Ctrl-C again ends at once and loses what is since the last one",
            err=True,
        )
        _end(cluster, job_id, run_folder)
        raise


class _Detached(Exception):
    """The cluster that was started here is to stay."""


def _end(cluster: "JobServer", job_id: str, run_folder: Path) -> None:
    from swiftkv.cli.follow import follow_run
    from swiftkv.distill.folder import request_stop
    from swiftkv.jobs import stop_job

    try:
        request_stop(run_folder)
    except ConfigError:  # not begun yet, or over
        stop_job(cluster, job_id)
        return
    try:
        follow_run(cluster, job_id)
    except KeyboardInterrupt:
        stop_job(cluster, job_id)
        raise


def _stop(run_folder: Path, address: str | None) -> None:
    from swiftkv.jobs import find_job, follow_job, submit_job

    cluster: Any = RemoteCluster(dashboard_url=address) if address is not None else find_cluster()
    job_id = find_job(cluster, str(run_folder)) if cluster is not None else None
    if job_id is None:
        raise ConfigError(f"{run_folder}: no such run is going on. A run that has ended or died needs no stopping.")
    if address is None:
        from swiftkv.distill.folder import request_stop

        request_stop(run_folder)
    else:
        command = shlex.join(["python", str(SCRIPT), "--stop", str(run_folder)])
        for _ in follow_job(cluster, submit_job(cluster, command, checkout=Path.cwd())):
            pass
    typer.echo(f"job {job_id} saves a checkpoint at its next step and ends. Go on with: --resume {run_folder}")


@contextmanager
def _use_cluster(num_cpus: int | None) -> Iterator[tuple[Cluster, bool]]:
    """The own cluster that is running, or one for this command; whether it is the second."""
    cluster = find_cluster()
    if cluster is not None:
        typer.echo("using the Ray cluster that is running; the job waits until enough of its CPUs are free", err=True)
        yield cluster, False
        return
    typer.echo("starting a Ray cluster", err=True)
    cluster = start_cluster(num_cpus=num_cpus)
    try:
        yield cluster, True
    except _Detached:
        return
    except BaseException:
        stop_cluster(cluster)
        raise
    stop_cluster(cluster)
