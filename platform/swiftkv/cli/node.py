"""`swiftkv node head | worker`: one node of a cluster whose nodes start each by themselves, as containers do.

Called by: cli/main.py. Calls: cluster/node.py.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from swiftkv.cluster import read_tls
from swiftkv.cluster.node import GCS_PORT, Node, build_head, build_worker

node_app = typer.Typer(help="One node of a Ray cluster of several, in the foreground.", no_args_is_help=True)

Address = Annotated[str | None, typer.Option(help="Where other nodes reach this one.", show_default="the host's name")]
ObjectStore = Annotated[int, typer.Option(min=80, help="Shared memory for Ray's objects, MB; /dev/shm must hold it.")]


@node_app.command()
def head(
    num_cpus: Annotated[int, typer.Option(min=0, help="CPUs for replicas and jobs; 0 leaves them to workers.")] = 0,
    object_store_mb: ObjectStore = 200,
    address: Address = None,
    ssl_certfile: Annotated[Path | None, typer.Option(help="The endpoint's certificate, PEM: it speaks TLS.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="The certificate's key, PEM.")] = None,
) -> None:
    """The cluster's head, with dashboard, jobs and the HTTP endpoint. RAY_AUTH_TOKEN_PATH names its token."""
    tls = read_tls({"ssl_certfile": ssl_certfile, "ssl_keyfile": ssl_keyfile}, "swiftkv node head")
    _become(build_head(os.environ, num_cpus, object_store_mb * 10**6, address, tls))


@node_app.command()
def worker(
    head: Annotated[str, typer.Argument(help=f"The head: a name or address, with :{GCS_PORT} or another port.")],
    num_cpus: Annotated[int | None, typer.Option(min=1, help="CPUs for replicas and jobs. Default: all.")] = None,
    object_store_mb: ObjectStore = 200,
    address: Address = None,
) -> None:
    """A node on which replicas and jobs run, with all the GPUs that it sees."""
    _become(build_worker(os.environ, head, num_cpus, object_store_mb * 10**6, address))


def _become(node: Node) -> None:
    """Ray in this process's place, so that signals and the exit status are its own."""
    os.execve(node.command[0], node.command, node.environment)
