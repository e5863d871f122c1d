"""`swiftkv serve`: a model, or a Serve config, behind an OpenAI-compatible endpoint on this machine, until Ctrl-C.

Called by: cli/main.py. Calls: cluster, serving/deploy.py.
"""

import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Console

from swiftkv.cluster import Cluster, Tls, find_cluster, is_loopback, read_tls, start_cluster, stop_cluster
from swiftkv.config import parse_settings, read_yaml
from swiftkv.engine.compiler import EAGER_REASON
from swiftkv.errors import ClusterError, ConfigError

if TYPE_CHECKING:  # imported where used: the settings' models take a quarter of the time of --help
    from swiftkv.serving.config import ServeSettings
    from swiftkv.serving.deploy import Progress

_POLL_S = 1.0


def serve(
    model: Annotated[
        str,
        typer.Argument(help="NAME, NAME@VERSION, NAME@ALIAS, a checkpoint folder's path, or a Serve config (.yaml)."),
    ],
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
    """Serve a model, or what a Serve config file says, until Ctrl-C."""
    from swiftkv.serving.checks import check_model
    from swiftkv.serving.config import ServeSettings
    from swiftkv.serving.deploy import check_port, deploy, deploy_config
    from swiftkv.serving.source import resolve_model

    if model.endswith((".yaml", ".yml")):
        config = read_serve_config(Path(model))
        if find_cluster() is None:  # one that is there may serve on the port already
            check_port((config.get("http_options") or {}).get("port", 8000), f"{model}: http_options.port")
        tls = read_tls(config.get("http_options") or {}, model)
        run(
            lambda cluster, report: _describe_config(config, deploy_config(cluster, config, report)),
            detach,
            Console(),
            tls,
        )
        return
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
    resolved = resolve_model(settings)  # a wrong name must not wait for a cluster
    check_model(resolved, "swiftkv serve")
    if find_cluster() is None:
        check_port(resolved.port, "--port")
    run(lambda cluster, report: _describe_model(deploy(cluster, resolved, report)), detach, Console())


def run(
    deploy_to: Callable[[Cluster, "Progress"], list[str]], detach: bool, console: Console, tls: Tls | None = None
) -> None:
    """Serves until interrupted, then stops what it started: the cluster, or the pools where the cluster was there.

    `deploy_to`: deploys to a cluster and returns the lines that say so. `tls`: of the endpoint.
    Raises: what `start_cluster` and `deploy_to` raise, after stopping; ClusterError if the cluster dies meanwhile.
    """
    existing = find_cluster()
    cluster = existing
    keep = False
    try:
        with console.status("starting a Ray cluster") as status:
            cluster = existing or start_cluster(tls=tls)
            lines = deploy_to(cluster, status.update)
        for line in [*lines, "stop it with `swiftkv down`" if detach else "Ctrl-C stops it"]:
            # soft_wrap: a pasted command must be one line.
            console.print(line, markup=False, highlight=False, soft_wrap=True)
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
        from swiftkv.serving.deploy import undeploy

        undeploy(cluster)
        console.print("what was served is stopped; the cluster was running before and stays (`swiftkv down` stops it)")


def read_serve_config(path: Path) -> dict[str, Any]:
    """A Serve config file's content.

    Raises: ConfigError if it is no such file, or one of our applications has a wrong setting.
    """
    from swiftkv.serving.checks import check_config

    config = read_yaml(path)
    if not isinstance(config, dict) or not config.get("applications"):
        raise ConfigError(f"{path}: no Serve config; it needs `applications` (see deployments/serve).")
    check_config(config, str(path))  # a wrong setting must not wait for a cluster
    return config


def _describe_config(config: dict[str, Any], base_url: str) -> list[str]:
    names = ", ".join(entry["name"] for entry in config["applications"])
    lines = [f"serving {names} at {base_url}", f"  curl {base_url}/models"]
    if not is_loopback(urlsplit(base_url).hostname or ""):
        lines.append("others reach this address: every request must bring a key of the tenants' file")
        if base_url.startswith("http:"):
            lines.append("and keys travel in clear text: name ssl_certfile and ssl_keyfile, or end TLS before it")
    return lines


def _describe_model(served: "ServeSettings") -> list[str]:
    body = shlex.quote(json.dumps({"model": served.model_id, "prompt": "def main(", "max_tokens": 32}))
    return [
        f"serving {served.model_id} at {served.base_url}",
        f"  curl {served.base_url}/completions -H 'Content-Type: application/json' -d {body}",
    ]


def _wait_for_interrupt(cluster: Cluster) -> None:
    while find_cluster() == cluster:
        time.sleep(_POLL_S)
    raise ClusterError("the cluster has ended; the endpoint is gone.")
