"""Submits a command as a Ray job to our own cluster and follows its log to the end.

Does not say what a job does, and does not stop a job when its follower stops: Ctrl-C is the caller's.
Called by: cli (distill).
Calls: cluster, Ray's job submission client.
"""

import asyncio
import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swiftkv.cluster import Cluster
from swiftkv.errors import ClusterError

# What an error shows of a failed job's log: enough for a traceback.
NUM_LAST_LINES = 25


def submit_job(
    cluster: Cluster,
    entrypoint: str,
    working_dir: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Starts the shell command `entrypoint` on the cluster and returns the job's id without waiting.

    `working_dir` is copied to the cluster and is the command's folder; None: the folder the cluster was
    started in. `environment` is set for the command and for every worker that it starts.
    Raises: ClusterError if the cluster does not answer or refuses the job.
    """
    runtime_env: dict[str, Any] = {"env_vars": dict(environment or {})}
    if working_dir:
        runtime_env["working_dir"] = str(working_dir)
    try:
        return str(_connect(cluster).submit_job(entrypoint=entrypoint, runtime_env=runtime_env))
    except (RuntimeError, ConnectionError, ValueError) as error:
        raise ClusterError(f"the cluster at {cluster.dashboard_url} did not take the job: {error}") from error


def follow_job(cluster: Cluster, job_id: str) -> Iterator[str]:
    """The job's log, line by line as it is written, ending when the job has succeeded.

    Raises: ClusterError with the last lines of the log if the job failed or was stopped.
    """
    client = _connect(cluster)
    last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
    for line in _follow_log(client, job_id):
        last_lines.append(line)
        yield line
    job = client.get_job_info(job_id)
    if job.status != "SUCCEEDED":
        message = (job.message or "no reason given").splitlines()[0]  # the log follows it
        reason = f"job {job_id} ended as {job.status}: {message}"
        raise ClusterError("\n".join([reason, *last_lines]))


def stop_job(cluster: Cluster, job_id: str) -> None:
    """Asks the cluster to end the job; a job that has ended stays as it is."""
    _connect(cluster).stop_job(job_id)


def _follow_log(client: Any, job_id: str) -> Iterator[str]:
    # The client tails through an asynchronous websocket, of whose end it tells; every caller of ours is synchronous.
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    loop = asyncio.new_event_loop()
    chunks = client.tail_job_logs(job_id)
    try:
        unfinished = ""
        while (chunk := loop.run_until_complete(anext(chunks, None))) is not None:
            *lines, unfinished = (unfinished + chunk).split("\n")
            yield from lines
        if unfinished:
            yield unfinished
    finally:
        loop.run_until_complete(chunks.aclose())
        loop.close()


def _connect(cluster: Cluster) -> Any:
    from ray.job_submission import JobSubmissionClient

    with _address_for_ray(cluster.dashboard_url):
        return JobSubmissionClient(cluster.dashboard_url, headers=cluster.headers())


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
