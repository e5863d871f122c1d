"""`swiftkv down`: stops the cluster that this folder's commands started. Stops no other Ray cluster.

Called by: cli/main.py. Calls: cluster.
"""

from rich.console import Console

from swiftkv.cluster import find_cluster, stop_cluster


def down() -> None:
    """Stop the running cluster and everything on it; does nothing if none runs."""
    console = Console()
    cluster = find_cluster()
    if cluster is None:
        console.print("nothing is running")
        return
    with console.status(f"stopping the cluster (process {cluster.pid})"):
        stop_cluster(cluster)
    console.print("stopped")
