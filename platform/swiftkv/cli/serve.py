"""`swiftkv serve`: a model behind an OpenAI-compatible endpoint on this machine, until Ctrl-C.

Called by: cli/main.py. Calls: cluster, serving/deploy.py.
"""

import json
import shlex
import signal
import time
from typing import Annotated

import typer
from rich.console import Console

from swiftkv.cluster import Cluster, find_cluster, start_cluster, stop_cluster
from swiftkv.config import parse_settings
from swiftkv.engine.compiler import EAGER_REASON
from swiftkv.errors import ClusterError
from swiftkv.serving.config import ServeSettings
from swiftkv.serving.deploy import deploy, undeploy
from swiftkv.serving.source import resolve_model

_POLL_S = 1.0


def serve(
    model: Annotated[str, typer.Argument(help="NAME, NAME@VERSION, NAME@ALIAS, or a checkpoint folder's path.")],
    store: Annotated[str | None, typer.Option(help="Registry: a folder or an object store's URL.")] = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 8000,
    model_id: Annotated[str | None, typer.Option(help="Name that clients use. Default: the model's.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of prompt and completion.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    kv_cache_gib: Annotated[float, typer.Option(help="KV cache per replica, GiB.")] = 0.5,
    replicas: Annotated[int, typer.Option(help="Engines.")] = 1,
    eager: Annotated[bool | None, typer.Option(help="Do not compile. Default: only without a compiler.")] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Tensors straight from the store, without a copy on this disk.")
    ] = False,
    detach: Annotated[bool, typer.Option(help="Leave it running; `swiftkv down` stops it.")] = False,
) -> None:
    """Serve a model until Ctrl-C."""
    options = {
        "model": model,
        "store": store,
        "stream": stream,
        "port": port,
        "model_id": model_id,
        "num_replicas": replicas,
        "engine": {
            "max_model_len": max_model_len,
            "max_num_seqs": 16,
            "dtype": dtype,
            "kv_cache_gib": kv_cache_gib,
            "enforce_eager": eager,
        },
    }
    settings = parse_settings(options, ServeSettings, "swiftkv serve")
    if settings.engine.lacks_compiler():
        typer.echo(f"engine: {EAGER_REASON}", err=True)
    run(settings, detach, Console())


def run(settings: ServeSettings, detach: bool, console: Console) -> None:
    """Serves until interrupted, then stops what it started: the cluster, or the pool where the cluster was there.

    Raises: what `start_cluster` and `deploy` raise, after stopping; ClusterError if the cluster dies meanwhile.
    """
    # A closed terminal or a supervisor's SIGTERM means the same as Ctrl-C: leave nothing behind.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    settings = resolve_model(settings)  # a wrong name must not wait for a cluster
    existing = find_cluster()
    cluster = existing
    keep = False
    try:
        with console.status("starting a Ray cluster") as status:
            cluster = existing or start_cluster()
            served = deploy(cluster, settings, status.update)
        _explain(console, served, detach)
        keep = detach
        if not detach:
            _wait_for_interrupt(cluster)
    except KeyboardInterrupt:
        console.print("stopping")
    finally:
        if cluster and not keep:
            _take_down(cluster, existing, console)


def _take_down(cluster: Cluster, existing: Cluster | None, console: Console) -> None:
    if existing is None:
        stop_cluster(cluster)
        console.print("stopped")
    elif find_cluster():
        undeploy(cluster)
        console.print("the pool is stopped; the cluster was running before and stays (`swiftkv down` stops it)")


def _explain(console: Console, served: ServeSettings, detached: bool) -> None:
    body = json.dumps({"model": served.model_id, "prompt": "def main(", "max_tokens": 32})
    console.print(f"serving {served.model_id} at {served.base_url}", markup=False)
    # soft_wrap: a pasted command must be one line.
    console.print(
        f"  curl {served.base_url}/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    console.print("stop it with `swiftkv down`" if detached else "Ctrl-C stops it")


def _wait_for_interrupt(cluster: Cluster) -> None:
    while find_cluster() == cluster:
        time.sleep(_POLL_S)
    raise ClusterError("the cluster has ended; the endpoint is gone.")
