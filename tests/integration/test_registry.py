"""What the registry moves inside Ray, as the cluster exports it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from boards import FLEET
from fakes import write_student
from prometheus_server import list_queries, wait_for_answers, watch

from swiftkv.cluster import start_cluster, stop_cluster
from swiftkv.metrics.reading import find_endpoints, look

pytestmark = pytest.mark.cluster

LAST = "ray_swiftkv_registry_verification_failures_total"
"""Of what the driver below has recorded."""

PANELS = {"Bytes/s to and from stores", "Seconds of an operation", "Failed verifications so far"}

DRIVER = '''
import sys
from pathlib import Path

import ray

from swiftkv.errors import IntegrityError
from swiftkv.registry.registry import Registry


@ray.remote(num_cpus=0)
class Mover:
    """A process that lives on, as a replica does."""

    def move(self, store, student, pulled):
        registry = Registry(store)
        registry.publish(Path(student), "tiny")
        registry.fetch("tiny")
        registry.pull("tiny", Path(pulled))
        list(registry.stream_tensors("tiny", lambda name: True))
        registry.verify("tiny")
        blobs = (path for path in Path(store, "blobs").rglob("*") if path.is_file())
        damaged = max(blobs, key=lambda path: path.stat().st_size)
        damaged.write_bytes(damaged.read_bytes()[::-1])
        try:
            registry.verify("tiny")
        except IntegrityError:
            return "refused"


ray.init(log_to_driver=False)
mover = Mover.remote()
print(ray.get(mover.move.remote(*sys.argv[1:])), flush=True)
sys.stdin.read()
'''


def test_what_an_actor_moves_and_finds_damaged_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFTKV_HOME", str(tmp_path / "home"))
    student = write_student(tmp_path / "student")
    num_bytes = sum(path.stat().st_size for path in student.iterdir())
    (tmp_path / "driver.py").write_text(DRIVER)
    words = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "store"), str(student)]
    cluster = start_cluster(num_cpus=1)
    try:
        discovery = cluster.folder / "r" / "prom_metrics_service_discovery.json"
        with (
            watch(cluster, tmp_path / "prometheus") as prometheus,
            subprocess.Popen(
                [*words, str(tmp_path / "pulled")],
                env=cluster.environment() | {"SWIFTKV_HOME": str(tmp_path / "home")},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            ) as driver,
        ):
            assert driver.stdout is not None and driver.stdout.readline() == "refused\n"
            deadline = time.monotonic() + 60
            while not (seen := look(find_endpoints(discovery))).samples.get(LAST):
                assert time.monotonic() < deadline
                time.sleep(0.5)
            if prometheus:
                wait_for_answers(prometheus, list_queries(FLEET, PANELS))
            driver.communicate()
    finally:
        stop_cluster(cluster)
    moved = seen.sum_by("ray_swiftkv_registry_bytes_total", "operation")
    times = {"publish": 1, "fetch": 1, "pull": 1, "verify": 2}
    assert {operation: moved[operation,] for operation in times} == {name: n * num_bytes for name, n in times.items()}
    assert moved["stream",] > (student / "model.safetensors").stat().st_size / 2
    assert seen.sum_by(LAST, "operation") == {("verify",): 1}
    succeeded = dict.fromkeys([("publish",), ("fetch",), ("pull",), ("stream",), ("verify",)], 1)
    assert seen.sum_by("ray_swiftkv_registry_seconds_count", "operation") == succeeded
    assert all(seen.sum_by("ray_swiftkv_registry_seconds_sum", "operation").values())
    assert max(seen.sum_by("ray_swiftkv_registry_seconds_bucket", "operation", le="+Inf").values()) == 1
