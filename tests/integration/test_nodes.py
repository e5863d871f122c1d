"""A node that has never seen the model, beside the head: the replica that Ray puts there fetches it.

Two raylets of one machine, each with a SWIFTKV_HOME of its own, as two machines have.
"""

import subprocess
import sys

import httpx
import pytest
from fakes import TinyShape, write_student
from reference import generate_greedy, load_weights

from swiftkv.cluster import choose_ports, start_cluster, stop_cluster
from swiftkv.cluster.processes import MARK
from swiftkv.errors import EngineError
from swiftkv.registry.registry import Registry
from swiftkv.serving.deploy import deploy_config

pytestmark = [pytest.mark.cluster, pytest.mark.engine]

PROMPT = list(b"def f(x): return x + 1")
ENGINE = {"dtype": "float32", "enforce_eager": True, "kv_cache_gib": 0.06, "max_num_seqs": 4, "max_model_len": 256}
NODE_CPUS = 2
"""More than the head has."""
OBJECT_STORE_BYTES = 80_000_000

# As `ray.cluster_utils` does: `ray start` takes no second node where all addresses are loopback.
NODE = """
import signal, sys
from ray._private.node import Node
from ray._private.parameter import RayParams
address, num_cpus, object_store_bytes = sys.argv[1:]
ports = {"node_manager_port": 0, "min_worker_port": 0, "max_worker_port": 0}
sizes = {"num_cpus": int(num_cpus), "object_store_memory": int(object_store_bytes)}
place = {"gcs_address": address, "node_ip_address": "127.0.0.1", "include_log_monitor": False}
params = RayParams(**place, **ports, **sizes)
params.dashboard_agent_listen_port = None  # any
Node(params, head=False, shutdown_at_exit=True, spawn_reaper=False)
print("up", flush=True)
signal.pause()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of both homes, `first` with the head and `second` with the node, and of what both see."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("nodes")
        patch.setenv("SWIFTKV_HOME", str(folder / "first"))
        yield folder


@pytest.fixture(scope="module")
def student(folder):
    return write_student(folder / "tiny", TinyShape(max_position_embeddings=256), 2, 2)


@pytest.fixture(scope="module")
def cluster(folder):
    cluster = start_cluster(num_cpus=1, object_store_bytes=OBJECT_STORE_BYTES)
    try:
        own = {MARK: str(cluster.folder), "SWIFTKV_HOME": str(folder / "second"), "RAY_num_workers_soft_limit": "0"}
        environment = {name: value for name, value in cluster.environment().items() if name != "RAY_ADDRESS"} | own
        words = [sys.executable, "-c", NODE, cluster.address, str(NODE_CPUS), str(OBJECT_STORE_BYTES)]
        node = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
        assert node.stdout.readline() == "up\n"
        yield cluster
    finally:
        stop_cluster(cluster)  # and the node, which has its mark


@pytest.fixture(scope="module")
def build_config(folder, student):
    """A Serve config with an application of this name, whose replica only the node can have."""
    registry = Registry(folder / "store")
    registry.publish(student, "tiny")
    registry.set_alias("tiny", "production", "1")
    pool = {"model": "tiny@production", "store": registry.location, "engine": ENGINE, "num_cpus": NODE_CPUS}
    http = {"host": "127.0.0.1", "port": choose_ports(1)[0]}

    def build(name):
        application = {"name": name, "import_path": "swiftkv.serving.app:build_app", "args": pool}
        return {"proxy_location": "HeadOnly", "http_options": http, "applications": [application]}

    return build


def test_a_replica_that_cannot_have_it_says_where_and_why(cluster, folder, build_config):
    (folder / "second").mkdir(exist_ok=True)
    (folder / "second" / "cache").touch()  # where a folder belongs
    with pytest.raises(EngineError, match=r"node 127\.0\.0\.1 .* did not get tiny@1 of .*second/cache"):
        deploy_config(cluster, build_config("refused"))
    (folder / "second" / "cache").unlink()


def test_a_replica_answers_from_what_it_fetched_to_its_own_node(cluster, folder, student, build_config):
    url = deploy_config(cluster, build_config("answering"))
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    answer = httpx.post(f"{url}/completions", json=body, timeout=60).raise_for_status().json()
    assert answer["choices"][0]["token_ids"] == generate_greedy(*load_weights(student), PROMPT, 8)
    (copy,) = folder.glob("*/cache/models/*/model.safetensors")
    assert copy.is_relative_to(folder / "second")
    logs = (cluster.folder / "r").glob("session_*/logs/serve/replica_*")
    assert any("tiny@1 is verified in" in log.read_text() for log in logs)
