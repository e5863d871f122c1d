"""Starts, finds and stops one Ray cluster that belongs to this project alone, on this machine's loopback.

Joins no other Ray cluster and stops none: `ray stop` and Ray's address discovery are never used, every port is
the cluster's own, and so are its token and its folder. Knows nothing of what runs on the cluster.
Called by: cli/cluster.py, cli/serve.py, cli (distill), jobs.py, serving/deploy.py.
Calls: the `ray start` command, processes.py, ports.py, haproxy.py.
"""

import fcntl
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from swiftkv.cluster import haproxy
from swiftkv.cluster.ports import choose_ports
from swiftkv.cluster.processes import MARK, end_processes, find_members, get_mark
from swiftkv.cluster.tls import Tls
from swiftkv.config import StrictModel, home
from swiftkv.errors import ClusterError

START_TIMEOUT_S = 90.0

# Unix socket paths end at 107 bytes and Ray and HAProxy put up to 72 of their own below the folder.
_MAX_TEMPORARY_FOLDER_BYTES = 22

_METRICS_LINK = "metrics_endpoints.json"
"""In the local state, where dashboards/prometheus/prometheus.yml looks: a cluster's own folder has another name each
time."""

# A request passes three replicas and would change threads several times in each; nothing of ours blocks the loop. Over
# gRPC replicas reach each other without Ray's workers between them, and notice when the other one has died.
SHORT_WAY = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
}

# Ray reads this on Linux too: when off, it leaves loopback addresses as they are instead of replacing them by the
# machine's own, and every server of the cluster but Serve's replicas binds to 127.0.0.1 (Ray 2.60). UCX, which moves KV
# for NIXL, would listen on every network card.
_LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "UCX_NET_DEVICES": "lo"}


class Cluster(StrictModel):
    """A running Ray cluster of ours."""

    pid: int
    """The head process, leader of a session of its own."""

    address: str
    """host:port for `ray.init`."""

    dashboard_url: str
    """http://host:port of the dashboard: jobs and Serve's REST API."""

    folder: Path
    """Logs, sockets, token; removed when the cluster stops."""

    tls: Tls | None = None
    """Of its endpoint, which cannot get one later."""

    @property
    def token_path(self) -> Path:
        """The file, readable by its owner only, with the token that every client must send."""
        return self.folder / "token"

    @property
    def metrics_path(self) -> Path:
        """The file in which Ray's head keeps the endpoints of metrics, for Prometheus."""
        return _ray_folder(self.folder) / "prom_metrics_service_discovery.json"

    def headers(self) -> dict[str, str]:
        """What a request to the dashboard must carry."""
        return {"Authorization": f"Bearer {self.token_path.read_text(encoding='utf-8')}"}

    def environment(self) -> dict[str, str]:
        """The whole environment for a subprocess that is to use this cluster and no other."""
        return _environment_without_ray() | {
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
            **_LOOPBACK_ONLY,
            **SHORT_WAY,
        }


def start_cluster(
    num_cpus: int | None = None, object_store_bytes: int = 200_000_000, tls: Tls | None = None
) -> Cluster:
    """A new cluster of one node with `num_cpus` logical CPUs (None: the cores this process may use).

    `tls`: of the endpoint that Serve will have on it. It outlives this process; `stop_cluster` or `swiftkv down` ends
    it. Takes about 6 s on two cores.
    Raises: ClusterError if one of ours is running already, or with the end of Ray's log if it did not start.
    """
    with _lock():
        running = find_cluster()
        if running:
            raise ClusterError(
                f"a cluster of {home()} is running already (process {running.pid}). "
                "Use it, or stop it with `swiftkv down`."
            )
        folder = _make_folder()
        ports = choose_ports(10 + haproxy.NUM_PORTS)
        command = _start_command(num_cpus or len(os.sched_getaffinity(0)), object_store_bytes, folder, ports)
        head = _start_head(command, folder, ports, tls)
        cluster = Cluster(
            pid=head.pid,
            address=f"127.0.0.1:{ports[0]}",
            dashboard_url=f"http://127.0.0.1:{ports[1]}",
            folder=folder,
            tls=tls,
        )
        try:
            _write_record(cluster)
            _wait_until_started(cluster, head)
        except BaseException:
            stop_cluster(cluster)
            raise
    return cluster


def find_cluster() -> Cluster | None:
    """Our running cluster, or None. What a dead one left behind (processes, folder, record) is removed."""
    cluster = read_record()
    if cluster is None:
        return None
    # The mark, not the pid alone: after a restart of the machine the pid belongs to someone else.
    if get_mark(cluster.pid) == str(cluster.folder):
        return cluster
    stop_cluster(cluster)
    return None


def stop_cluster(cluster: Cluster) -> None:
    """Ends every process of the cluster and removes its folder and record. Stopping it again does nothing.

    Covers what runs on it too: job drivers, workers, Serve, HAProxy, vLLM's engine processes.
    Raises: ClusterError naming the processes that could not be ended.
    """
    left = end_processes(cluster.pid, str(cluster.folder))
    if left:
        raise ClusterError(f"could not end processes {[p.pid for p in left]} of the cluster in {cluster.folder}.")
    shutil.rmtree(cluster.folder, ignore_errors=True)
    if read_record() == cluster:
        (home() / _METRICS_LINK).unlink(missing_ok=True)
        _record_path().unlink(missing_ok=True)


def read_record() -> Cluster | None:
    """The cluster that was started last and not stopped, running or not. Changes nothing."""
    try:
        return Cluster.model_validate_json(_record_path().read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def find_processes(cluster: Cluster) -> list[psutil.Process]:
    """Every living process of the cluster and of what runs on it."""
    return find_members(cluster.pid, str(cluster.folder))


def _start_head(command: list[str], folder: Path, ports: list[int], tls: Tls | None) -> subprocess.Popen[bytes]:
    with (folder / "start.log").open("wb") as log:
        return subprocess.Popen(
            command,
            env=_head_environment(folder, ports, tls),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal must not reach it
        )


def _start_command(num_cpus: int, object_store_bytes: int, folder: Path, ports: list[int]) -> list[str]:
    port_options = (
        "--port",
        "--dashboard-port",
        "--dashboard-agent-listen-port",
        "--dashboard-agent-grpc-port",
        "--metrics-export-port",
        "--runtime-env-agent-port",
        "--ray-client-server-port",
        "--object-manager-port",
        "--node-manager-port",
    )
    options = {option: str(port) for option, port in zip(port_options, ports, strict=False)} | {
        "--node-ip-address": "127.0.0.1",
        "--dashboard-host": "127.0.0.1",
        "--include-dashboard": "true",
        "--temp-dir": str(_ray_folder(folder)),
        "--num-cpus": str(num_cpus),
        "--object-store-memory": str(object_store_bytes),
        # 0: any free port. Ray's fixed range would be shared with another cluster of the machine.
        "--min-worker-port": "0",
        "--max-worker-port": "0",
    }
    # --no-monitor: one node never scales.
    flags = ["--head", "--block", "--no-monitor", "--disable-usage-stats"]
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start"]
    return ray + flags + [word for option in options.items() for word in option]


def _head_environment(folder: Path, ports: list[int], tls: Tls | None) -> dict[str, str]:
    scratch = folder / "t"
    scratch.mkdir()
    return (
        _environment_without_ray()
        | {
            MARK: str(folder),
            "SWIFTKV_HOME": str(home()),  # absolute: a worker's folder is not ours
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "DASHBOARD_METRIC_PORT": str(ports[9]),
            # Sockets and scratch files of whatever runs here go when the cluster goes.
            "TMPDIR": str(scratch),
            # Ray keeps as many idle workers as CPUs; one that has built an application holds 0.5 GB.
            "RAY_num_workers_soft_limit": "0",
            "PYTHONUNBUFFERED": "1",
            **haproxy.prepare_haproxy(folder, ports[10:], tls),
            **_LOOPBACK_ONLY,
            **SHORT_WAY,
        }
    )


def _environment_without_ray() -> dict[str, str]:
    # RAY_ADDRESS, RAY_AUTH_TOKEN and the like would lead to another cluster. VLLM_CPU_KVCACHE_SPACE would
    # silently win over the KV cache size of our own settings.
    dropped = {MARK, "VLLM_CPU_KVCACHE_SPACE"}
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k not in dropped}


def _make_folder() -> Path:
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) > _MAX_TEMPORARY_FOLDER_BYTES:
        base = "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="swk-", dir=base))  # mode 700
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    return folder


def _ray_folder(folder: Path) -> Path:
    return folder / "r"


def _wait_until_started(cluster: Cluster, head: subprocess.Popen[bytes]) -> None:
    # `ray start` writes this file last, when GCS, raylet and dashboard have answered.
    address_file = _ray_folder(cluster.folder) / "ray_current_cluster"
    deadline = time.monotonic() + START_TIMEOUT_S
    while not address_file.is_file():
        if head.poll() is not None or time.monotonic() > deadline:
            lines = (cluster.folder / "start.log").read_text(encoding="utf-8", errors="replace").splitlines()
            reason = "ended" if head.poll() is not None else f"was not up after {START_TIMEOUT_S:.0f} s"
            raise ClusterError(f"the Ray cluster {reason}. The end of its log:\n" + "\n".join(lines[-20:]))
        time.sleep(0.1)


def _record_path() -> Path:
    return home() / "cluster.json"


def _write_record(cluster: Cluster) -> None:
    partial = _record_path().with_suffix(".partial")
    partial.write_text(json.dumps(cluster.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
    partial.replace(_record_path())  # nobody reads half a record
    link = home() / _METRICS_LINK
    link.unlink(missing_ok=True)
    link.symlink_to(cluster.metrics_path)


@contextmanager
def _lock() -> Iterator[None]:
    home().mkdir(parents=True, exist_ok=True)
    with (home() / "cluster.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
