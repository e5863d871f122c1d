"""A cluster of our own: alone, on loopback, behind a token, and gone when it is stopped."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml

from swiftkv import cluster as clusters
from swiftkv.cluster import Cluster, choose_ports, find_cluster, find_processes, lifecycle, start_cluster, stop_cluster
from swiftkv.errors import ClusterError
from swiftkv.jobs import follow_job, submit_job

PROMETHEUS = Path(__file__).resolve().parents[2] / "dashboards" / "prometheus"
ELSEWHERE = "192.0.2.1:6379"  # an address that no machine has


@pytest.fixture(scope="module")
def our_home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("SWIFTKV_HOME", str(folder))
        # A user of another cluster has these set; ours must not follow them.
        patch.setenv("RAY_ADDRESS", ELSEWHERE)
        patch.setenv("RAY_AUTH_TOKEN", "0" * 64)
        yield folder


@pytest.fixture(scope="module")
def cluster(our_home):
    started = start_cluster(num_cpus=2)
    yield started
    stop_cluster(started)


@pytest.fixture(scope="module")
def foreign_cluster(tmp_path_factory):
    """A Ray cluster that is not ours, started as its owner would, with its process."""
    port, agent, client = choose_ports(3)
    folder = Path("/tmp") / f"foreign-{os.getpid()}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    command += [f"--temp-dir={folder}", "--num-cpus=1", "--object-store-memory=80000000", "--no-monitor"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    command += ["--include-dashboard=false", "--disable-usage-stats"]
    head = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: (folder / "ray_current_cluster").is_file())
    yield head
    for process in [*psutil.Process(head.pid).children(recursive=True), head]:
        process.kill()
    head.wait()
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def wait_for(condition, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)


def get_status_code(url, headers):
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


def test_ports_are_different_and_free():
    ports = choose_ports(20)
    assert len(set(ports)) == 20
    assert all(clusters.is_port_free(port) for port in ports)


def test_a_listening_port_is_not_free():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not clusters.is_port_free(server.getsockname()[1])


def test_nothing_is_found_without_a_record(tmp_path, monkeypatch):
    monkeypatch.setenv("SWIFTKV_HOME", str(tmp_path))
    assert find_cluster() is None


def test_record_of_a_process_that_is_not_ours_is_stale_and_spares_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SWIFTKV_HOME", str(tmp_path))
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        folder = tmp_path / "left"
        folder.mkdir()
        record = Cluster(pid=bystander.pid, address="a:1", dashboard_url="http://a:2", folder=folder)
        (tmp_path / "cluster.json").write_text(json.dumps(record.model_dump(mode="json")))
        assert find_cluster() is None
        assert bystander.poll() is None
        assert not folder.exists()
        assert not (tmp_path / "cluster.json").exists()
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.cluster
def test_start_that_fails_shows_ray_s_log_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("SWIFTKV_HOME", str(tmp_path))
    folders = []
    make = lifecycle._make_folder
    monkeypatch.setattr(lifecycle, "_make_folder", lambda: folders.append(make()) or folders[-1])
    with pytest.raises(ClusterError, match="object_store_memory|object store"):
        start_cluster(object_store_bytes=1)
    assert find_cluster() is None
    assert not folders[0].exists()
    assert not [path.name for path in tmp_path.iterdir() if path.suffix == ".json"]


@pytest.mark.cluster
def test_running_cluster_is_found(cluster):
    assert find_cluster() == cluster
    assert cluster.token_path.stat().st_mode & 0o777 == 0o600


@pytest.mark.cluster
def test_endpoints_of_metrics_are_where_the_shipped_prometheus_looks(cluster, our_home):
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    (found,) = config["scrape_configs"][0]["file_sd_configs"]
    in_checkout = [(PROMETHEUS / name).resolve() for name in found["files"] if not name.startswith("/")]
    link = our_home / lifecycle._METRICS_LINK
    assert in_checkout == [PROMETHEUS.parents[1] / ".swiftkv" / link.name]
    # Ray writes it anew every few seconds.
    wait_for(lambda: link.is_file() and json.loads(link.read_text())[0]["targets"])
    assert link.readlink() == cluster.metrics_path


@pytest.mark.cluster
def test_second_start_is_refused(cluster):
    with pytest.raises(ClusterError, match="swiftkv down"):
        start_cluster()
    assert find_cluster() == cluster


@pytest.mark.cluster
def test_every_server_of_ray_listens_on_loopback_only(cluster):
    listening = [
        connection.laddr.ip
        for process in find_processes(cluster)
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 5
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}


@pytest.mark.cluster
def test_dashboard_wants_the_token(cluster):
    jobs = cluster.dashboard_url + "/api/jobs/"
    assert get_status_code(jobs, {}) == 401
    assert get_status_code(jobs, {"Authorization": "Bearer " + "0" * 64}) == 403
    assert get_status_code(jobs, cluster.headers()) == 200


@pytest.mark.cluster
def test_gcs_wants_the_token(cluster):
    command = [sys.executable, "-c", "import ray; ray.init()"]
    stranger = cluster.environment() | {"RAY_AUTH_TOKEN": "0" * 64}
    refused = subprocess.run(command, env=stranger, capture_output=True, text=True, timeout=120)
    assert refused.returncode != 0
    assert "token" in refused.stderr.lower()


@pytest.mark.cluster
def test_job_runs_a_task_with_its_environment_and_its_lines_come_back(cluster):
    program = (
        "import ray, os; ray.init(); task = ray.remote(lambda: os.environ['GREETING']); print(ray.get(task.remote()))"
    )
    job_id = submit_job(cluster, f'{sys.executable} -c "{program}"', environment={"GREETING": "hello"})
    assert "hello" in list(follow_job(cluster, job_id))
    assert os.environ["RAY_ADDRESS"] == ELSEWHERE


@pytest.mark.cluster
def test_job_that_fails_raises_with_its_last_lines(cluster):
    job_id = submit_job(cluster, f"{sys.executable} -c \"raise SystemExit('out of luck')\"")
    with pytest.raises(ClusterError, match="FAILED(.|\n)*out of luck"):
        list(follow_job(cluster, job_id))


@pytest.mark.cluster
def test_job_without_an_entrypoint_is_refused(cluster):
    with pytest.raises(ClusterError, match="did not take the job"):
        submit_job(cluster, "true", checkout=Path("/no/such/folder"))


@pytest.mark.cluster
def test_stop_ends_every_process_and_spares_another_cluster(cluster, foreign_cluster):
    # A job whose child has a session of its own is the hardest to find.
    child = "import subprocess; subprocess.run(['sleep', '1234'], start_new_session=True)"
    job = follow_job(cluster, submit_job(cluster, f'{sys.executable} -c "{child}"'))
    next(job)
    wait_for(lambda: "sleep" in {process.name() for process in find_processes(cluster)})
    processes = find_processes(cluster)
    stop_cluster(cluster)
    job.close()
    assert [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    assert not cluster.folder.exists()
    assert find_cluster() is None
    assert foreign_cluster.poll() is None
    assert {"gcs_server", "raylet"} <= {p.name() for p in psutil.Process(foreign_cluster.pid).children()}
    stop_cluster(cluster)  # stopping it again does nothing


def test_down_with_nothing_running_says_so(tmp_path, monkeypatch, capsys):
    from swiftkv.cli.cluster import down

    monkeypatch.setenv("SWIFTKV_HOME", str(tmp_path))
    down()
    assert "nothing is running" in capsys.readouterr().out
