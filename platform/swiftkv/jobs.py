"""Submits a command as a Ray job to our own cluster or to another one, and follows its log to the end.

Does not say what a job does, and does not stop a job when its follower stops: Ctrl-C is the caller's.
Called by: cli/distill.py, cli/follow.py.
Calls: Ray's job submission client.
"""

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from swiftkv.errors import ClusterError

# What an error shows of a failed job's log: enough for a traceback.
NUM_LAST_LINES = 25

_ATTEMPTS = 5
"""At reading a job's log."""

_NOT_SHIPPED = (".git", ".venv", ".swiftkv", "runs", "tests", "reports", "**/__pycache__")
"""Of a checkout that is sent to another cluster."""


class JobServer(Protocol):
    """A cluster's dashboard, which takes jobs."""

    @property
    def dashboard_url(self) -> str:
        """http://host:port"""

    def headers(self) -> dict[str, str]:
        """What a request must carry."""


def submit_job(
    cluster: JobServer,
    entrypoint: str,
    checkout: Path | None = None,
    environment: Mapping[str, str] | None = None,
    run: str | None = None,
) -> str:
    """Starts the shell command `entrypoint` on the cluster and returns the job's id without waiting.

    `checkout`, this repository, is copied to the cluster, is the command's folder, and brings the package; None: the
    folder the cluster was started in. `environment` is set for the command and for every worker that it starts. `run`
    is what `find_job` knows the job by.
    Raises: ClusterError if the cluster does not answer or refuses the job.
    """
    runtime_env: dict[str, Any] = {"env_vars": dict(environment or {})}
    if checkout:
        package = str(checkout / "platform" / "swiftkv")
        runtime_env |= {"working_dir": str(checkout), "py_modules": [package], "excludes": list(_NOT_SHIPPED)}
    with _told(cluster, "did not take the job"):
        client = _connect(cluster)
        metadata = {"run": run} if run else None
        return str(client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env, metadata=metadata))


def find_job(cluster: JobServer, run: str) -> str | None:
    """The id of the job that was submitted for this run and has not ended, or None.

    Raises: ClusterError if the cluster does not answer.
    """
    with _told(cluster, "does not list its jobs"):
        jobs = _connect(cluster).list_jobs()
    for job in jobs:
        if (job.metadata or {}).get("run") == run and not job.status.is_terminal():
            return str(job.submission_id)
    return None


def follow_job(cluster: JobServer, job_id: str) -> Iterator[str]:
    """The job's log, line by line as it is written, ending when the job has succeeded.

    A dashboard that does not answer for a moment is asked again.
    Raises: ClusterError with the last lines of the log if the job failed or was stopped, or if the log was lost.
    """
    last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
    num_seen = 0
    for attempt in range(_ATTEMPTS):
        time.sleep(2.0 * (attempt > 0))
        with suppress(RuntimeError, OSError):
            client = _connect(cluster)
            for line in islice(_follow_log(client, job_id), num_seen, None):
                num_seen += 1
                last_lines.append(line)
                yield line
            job = client.get_job_info(job_id)
            if job.status.is_terminal():
                break
    else:
        raise ClusterError(f"{cluster.dashboard_url} no longer tells about job {job_id}, which may go on there.")
    if job.status != "SUCCEEDED":
        message = (job.message or "no reason given").splitlines()[0]  # the log follows it
        reason = f"job {job_id} ended as {job.status}: {message}"
        raise ClusterError("\n".join([reason, *last_lines]))


def stop_job(cluster: JobServer, job_id: str) -> None:
    """Asks the cluster to end the job; a job that has ended stays as it is."""
    with _told(cluster, "did not stop the job"):
        _connect(cluster).stop_job(job_id)


def _follow_log(client: Any, job_id: str) -> Iterator[str]:
    # The client tails through an asynchronous websocket, of whose end it tells; every caller of ours is synchronous.
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    chunks = client.tail_job_logs(job_id)

    async def take() -> str | None:
        return await anext(chunks, None)

    with asyncio.Runner() as runner:  # Ctrl-C ends what it waits for, so that it can be closed
        try:
            unfinished = ""
            while (chunk := runner.run(take())) is not None:
                *lines, unfinished = (unfinished + chunk).split("\n")
                yield from lines
            if unfinished:
                yield unfinished
        finally:
            runner.run(chunks.aclose())


def _connect(cluster: JobServer) -> Any:
    from ray.job_submission import JobSubmissionClient

    with _address_for_ray(cluster.dashboard_url):
        return JobSubmissionClient(cluster.dashboard_url, headers=cluster.headers())


@contextmanager
def _told(cluster: JobServer, what: str) -> Iterator[None]:
    """Ray's errors in one line."""
    try:
        yield
    except (RuntimeError, OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[-1]
        raise ClusterError(f"the cluster at {cluster.dashboard_url} {what}: {reason}") from error


@contextmanager
def _address_for_ray(url: str) -> Iterator[None]:
    # Ray prefers these variables to the address it is given (2.60): another cluster's would win.
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ["RAY_API_SERVER_ADDRESS"] = url
    try:
        yield
    finally:
        del os.environ["RAY_API_SERVER_ADDRESS"]
        os.environ.update(kept)
