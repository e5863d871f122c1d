"""Keeps what a Serve config says on a cluster of others: deploys it, and again where the cluster has lost it.

A cluster's head that is started anew knows nothing of what was deployed. What Serve itself mends (replicas, proxies) is
left to it. Called by: cli/deploy.py. Calls: serving/deploy.py.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

from swiftkv.cluster import RemoteCluster
from swiftkv.errors import ClusterError, SwiftKVError
from swiftkv.serving.deploy import Progress, connect, deploy_config

WATCH_S = 5.0
RETRY_S = 15.0
"""After a failure: workers may still be joining, or somebody is about to publish the model that is missing."""

ReadConfig = Callable[[], dict[str, Any]]
Wait = Callable[[float], None]


def keep_deployed(cluster: RemoteCluster, read: ReadConfig, report: Progress, wait: Wait = time.sleep) -> None:
    """Deploys until it succeeds and whenever an application is missing, for ever.

    `read` gives the config, checked, at each try. `report` gets a line whenever something has changed.
    """
    last = ""
    while True:
        try:
            config = read()
            url = deploy_config(cluster, config, report)
            last = ""
            report(f"serving {', '.join(entry['name'] for entry in config['applications'])} at {url}")
            _wait_until_lost(cluster, [entry["name"] for entry in config["applications"]], wait)
            report("the cluster has lost what was deployed: deploying again")
        except (SwiftKVError, OSError, RuntimeError) as error:  # Ray's clients raise the latter two where it is away
            reason = str(error) or type(error).__name__
            if reason != last:
                report(f"error: {reason}\ntrying again every {RETRY_S:.0f} s")
            last = reason
            wait(RETRY_S)


def _wait_until_lost(cluster: RemoteCluster, names: Iterable[str], wait: Wait) -> None:
    """Returns when an application is missing; a cluster that does not answer for a moment has lost nothing yet."""
    while True:
        wait(WATCH_S)
        try:
            applications = connect(cluster).get_serve_details()["applications"]
        except (ClusterError, OSError, RuntimeError):
            continue
        if any(name not in applications for name in names):
            return
