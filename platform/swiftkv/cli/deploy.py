"""`swiftkv deploy`: puts what a Serve config file says on a cluster that runs already, and keeps it there.

Called by: cli/main.py. Calls: serving/deploy.py, serving/keeping.py, cli/serve.py for reading the file.
"""

from pathlib import Path
from typing import Annotated

import typer

from swiftkv.cluster import RemoteCluster


def deploy(
    config: Annotated[Path, typer.Argument(help="A Serve config file (.yaml), see deployments/serve.")],
    address: Annotated[str, typer.Option(help="The cluster's dashboard, http://host:8265.", show_default=False)],
    keep: Annotated[
        bool, typer.Option("--keep", help="Stay, and deploy again where it failed or the cluster has lost it.")
    ] = False,
) -> None:
    """Deploy a Serve config to a running cluster, whose token RAY_AUTH_TOKEN_PATH names, and wait until it answers."""
    from swiftkv.cli.serve import read_serve_config
    from swiftkv.serving.deploy import deploy_config
    from swiftkv.serving.keeping import keep_deployed

    cluster = RemoteCluster(dashboard_url=address)
    if keep:
        keep_deployed(cluster, lambda: read_serve_config(config), typer.echo)
    else:
        typer.echo(f"serving at {deploy_config(cluster, read_serve_config(config), typer.echo)}")
