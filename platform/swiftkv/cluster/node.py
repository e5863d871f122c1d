"""The command and environment of one node of a cluster whose nodes start each by themselves, as containers do.

Starts nothing and finds nothing: whoever runs the command stops it. Unlike lifecycle.py's cluster, which is one node on
loopback, a node listens on an address that other nodes reach, behind the token that all of them are given.
Called by: cli/node.py. Calls: haproxy.py, ports.py.
"""

import os
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from swiftkv.cluster import haproxy
from swiftkv.cluster.lifecycle import SHORT_WAY
from swiftkv.cluster.ports import choose_ports
from swiftkv.cluster.tls import Tls
from swiftkv.errors import ClusterError

GCS_PORT = 6379
"""Where nodes find the head. Ray's own default, like those below."""
DASHBOARD_PORT = 8265
AGENT_PORT = 52365
"""Of each node: http://127.0.0.1:52365/api/healthz tells, without a token, whether it is well."""
METRICS_PORT = 8080
NODE_PORTS = {"--object-manager-port": 8076, "--node-manager-port": 8077}

MIN_TOKEN_CHARACTERS = 32

_FOREIGN = ("RAY_ADDRESS", "VLLM_CPU_KVCACHE_SPACE")
"""Of the environment: the first would lead to another cluster, the second would silently win over our own settings."""


@dataclass(frozen=True)
class Node:
    """What to run."""

    command: list[str]
    environment: dict[str, str]


def build_head(
    environment: Mapping[str, str],
    num_cpus: int,
    object_store_bytes: int,
    address: str | None,
    tls: Tls | None = None,
) -> Node:
    """The node that holds the cluster's state, the dashboard and the HTTP endpoint of Ray Serve.

    `num_cpus`: what of it replicas and jobs may take; 0 leaves all work to other nodes. `address`: where other nodes
    reach it; None takes that of this host's name. `tls`: of the endpoint.
    Raises: ClusterError without a token, or if the host's name has no address that others reach.
    """
    address = address or find_address()
    # HAProxy's files: removed with the container, or by whoever runs this elsewhere.
    folder = Path(tempfile.mkdtemp(prefix="swk-"))
    options = {
        "--port": GCS_PORT,
        "--dashboard-host": address,
        "--dashboard-port": DASHBOARD_PORT,
        "--include-dashboard": "true",
    }
    flags = ["--head", "--no-monitor"]  # the nodes are given: nothing scales them
    own = haproxy.prepare_haproxy(folder, choose_ports(haproxy.NUM_PORTS), tls)
    return _build(environment, flags, options, num_cpus, object_store_bytes, address, own)


def build_worker(
    environment: Mapping[str, str], head: str, num_cpus: int | None, object_store_bytes: int, address: str | None
) -> Node:
    """A node of the cluster whose head is at `head`, a name or host:port.

    `num_cpus` None: all that this process may use. GPUs are counted by Ray itself.
    Raises: as `build_head`.
    """
    options = {"--address": head if ":" in head else f"{head}:{GCS_PORT}"}
    count = num_cpus or len(os.sched_getaffinity(0))
    return _build(environment, [], options, count, object_store_bytes, address or find_address(), {})


def find_address() -> str:
    """The address of this host's name, which in a container is that of its network.

    Raises: ClusterError if it is none that others reach.
    """
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        raise ClusterError(f"the host's name {name} has no address ({error}); give one with --address.") from error
    if address.startswith("127."):
        raise ClusterError(f"the host's name {name} means {address}, which no other node reaches; give --address.")
    return address


def check_token(environment: Mapping[str, str]) -> None:
    """Raises: ClusterError if there is no file with a token that is long enough."""
    path = environment.get("RAY_AUTH_TOKEN_PATH")
    how = "Write one (`openssl rand -hex 32 > FILE`), the same for all nodes, and name it in RAY_AUTH_TOKEN_PATH."
    if not path:
        raise ClusterError(f"RAY_AUTH_TOKEN_PATH is not set, and no node starts without a token. {how}")
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"the token in {path} (RAY_AUTH_TOKEN_PATH) cannot be read: {error}. {how}") from error
    if len(token) < MIN_TOKEN_CHARACTERS:
        raise ClusterError(
            f"the token in {path} has {len(token)} characters, of {MIN_TOKEN_CHARACTERS} at least. {how}"
        )


def _build(
    environment: Mapping[str, str],
    flags: list[str],
    options: Mapping[str, object],
    num_cpus: int,
    object_store_bytes: int,
    address: str,
    own: Mapping[str, str],
) -> Node:
    check_token(environment)
    all_options = {
        **options,
        "--node-ip-address": address,
        "--num-cpus": num_cpus,
        "--object-store-memory": object_store_bytes,
        "--dashboard-agent-listen-port": AGENT_PORT,
        "--metrics-export-port": METRICS_PORT,
        **NODE_PORTS,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *flags]
    command += [str(word) for option in all_options.items() for word in option]
    kept = {name: value for name, value in environment.items() if name not in _FOREIGN}
    # Ray keeps as many idle workers as CPUs; one that has built an application holds 0.5 GB.
    defaults = {"RAY_num_workers_soft_limit": "0", "PYTHONUNBUFFERED": "1"}
    needed = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", **SHORT_WAY, **own}
    return Node(command, defaults | kept | needed)
