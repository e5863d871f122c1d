"""Two versions with different weights on a real cluster, each a pair of real engines with NIXL between them, under load
while the alias moves: every answer is that of the version which it names.
"""

import concurrent.futures
import itertools
import random
import threading
import time
import urllib.request

import httpx
import psutil
import pytest
from fakes import TinyShape, write_student
from reference import generate_greedy, load_weights

from swiftkv.cluster import choose_ports, start_cluster, stop_cluster
from swiftkv.registry.registry import Registry
from swiftkv.serving.deploy import deploy_config

pytestmark = [pytest.mark.cluster, pytest.mark.engine, pytest.mark.soak]

LENGTHS = (5, 40, 127, 129, 300, 513, 700, 1100)
NUM_TOKENS = 8
NUM_CLIENTS = 4


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("SWIFTKV_HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def folders(home):
    """Checkpoints of two versions, by the name of their application."""
    shape = TinyShape(max_position_embeddings=2304)
    return {f"tiny@{seed + 1}": write_student(home / f"seed{seed}", shape, 2, 2, seed=seed) for seed in (0, 1)}


@pytest.fixture(scope="module")
def references(folders):
    """The right answer by application and number of the prompt."""
    answers = {}
    for name, folder in folders.items():
        weights = load_weights(folder)
        for number, length in enumerate(LENGTHS):
            answers[name, number] = generate_greedy(*weights, build_prompt(number, length), NUM_TOKENS)
    for number in range(len(LENGTHS)):
        assert answers["tiny@1", number] != answers["tiny@2", number], "an answer that tells nothing"
    return answers


@pytest.fixture(scope="module")
def serving(home, folders):
    """The cluster, its URL and registry, with the first version."""
    registry = Registry(home / "registry")
    registry.publish(folders["tiny@1"], "tiny")
    registry.set_alias("tiny", "production", "1")
    cluster = start_cluster()
    try:
        config = build_config(*choose_ports(1))
        yield cluster, deploy_config(cluster, config), registry
    finally:
        stop_cluster(cluster)


def build_config(port):
    pair = {
        "prefill": {"engine": build_engine("0"), "num_cpus": 0.25},
        "decode": {"engine": build_engine("1"), "num_cpus": 0.25},
        "hop": {"min_tokens": 20, "timeout_s": 60, "retry_s": 1},
        "kv_lease_s": 5,
    }
    rollout = {
        "model": "tiny",
        "version": {"args": pair},
        "share_frac": 0.5,
        "min_requests": 60,
        "compared_frac": 0.2,
        "min_compared": 5,
        "warm_prompt_tokens": 100,
        # Random models agree in nothing, and four engines on two cores have no times worth comparing.
        "bounds": {"max_ttft_ratio": None, "max_tpot_ratio": None, "min_agreement_frac": None},
    }
    gateway = {"models": {"tiny": {}}, "num_replicas": 2, "limits": {"ttft_target_s": None}}
    applications = [
        build_application("rollout", None, "swiftkv.serving.rollout.app:build_rollout_app", rollout),
        build_application("gateway", "/", "swiftkv.serving.gateway.app:build_gateway_app", gateway),
    ]
    http = {"host": "127.0.0.1", "port": port}
    return {"proxy_location": "HeadOnly", "http_options": http, "applications": applications}


def build_application(name, route_prefix, import_path, args):
    return {"name": name, "route_prefix": route_prefix, "import_path": import_path, "args": args}


def build_engine(core):
    sizes = {"kv_cache_gib": 0.06, "max_num_seqs": 8, "max_num_batched_tokens": 512}
    return {"dtype": "float32", "enforce_eager": True, "cpu_cores": core, **sizes}


def build_prompt(seed, length):
    draw = random.Random(seed)
    return [draw.randrange(256) for _ in range(length)]


def count_handed_over(cluster):
    """Prompts that decode replicas had prefilled elsewhere, as Ray's agent on this node exports them."""
    words = psutil.Process(cluster.pid).cmdline()
    port = words[words.index("--metrics-export-port") + 1]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    found = [line for line in lines if line.startswith("ray_swiftkv_hop_prompts_total{") and 'way="remote"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in found)


class Load:
    """Asks the same prompts over and over, so that caches of both versions hold them all."""

    def __init__(self, url):
        self.answers = []
        """Application, number of the prompt, and its tokens; or what went wrong."""
        self._url = url
        self._is_over = threading.Event()
        self._threads = concurrent.futures.ThreadPoolExecutor(NUM_CLIENTS)
        self._running = [self._threads.submit(self._send, number) for number in range(NUM_CLIENTS)]

    def stop(self):
        self._is_over.set()
        for running in self._running:
            running.result()

    def _send(self, seed):
        draw = random.Random(seed)
        with httpx.Client(timeout=120) as client:
            while not self._is_over.is_set():
                number = draw.randrange(len(LENGTHS))
                body = {"prompt": build_prompt(number, LENGTHS[number]), "temperature": 0, "max_tokens": NUM_TOKENS}
                body |= {"ignore_eos": True, "return_token_ids": True, "cache_salt": str(draw.randrange(3))}
                response = client.post(f"{self._url}/completions", json=body)
                if response.status_code != 200:
                    self.answers.append((response.status_code, number, response.text))
                    continue
                tokens = response.json()["choices"][0]["token_ids"]
                self.answers.append((response.headers["x-swiftkv-application"], number, tokens))


def test_every_answer_under_a_moving_alias_is_of_the_version_that_it_names(serving, folders, references):
    cluster, url, registry = serving
    load = Load(url)
    try:
        wait_for(lambda: len(load.answers) > 50, 120)
        registry.publish(folders["tiny@2"], "tiny")
        registry.set_alias("tiny", "production", "2")
        wait_for(lambda: list_versions(cluster) == {"tiny@1", "tiny@2"}, 60)
        wait_for(lambda: list_versions(cluster) == {"tiny@2"}, 400)
        seen = len(load.answers)
        wait_for(lambda: len(load.answers) > seen + 50, 120)
    finally:
        load.stop()
    names = [name for name, _, _ in load.answers]
    both = [name for name, group in itertools.groupby(names)]
    print(f"{len(names)} answers: {names.count('tiny@1')} of version 1, {names.count('tiny@2')} of version 2, ")
    print(f"turning from one to the other {len(both) - 1} times")
    assert {tuple(found) for found in load.answers if found[0] not in folders} == set(), "failed"
    assert [found for found in load.answers if found[2] != references[found[0], found[1]]] == []
    assert len(both) > 20
    assert set(names[-50:]) == {"tiny@2"}
    handed_over = count_handed_over(cluster)
    print(f"{handed_over:.0f} prompts were prefilled by a prefill pool")
    assert handed_over > 50


def list_versions(cluster):
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    details = ServeSubmissionClient(cluster.dashboard_url, headers=cluster.headers()).get_serve_details()
    return {name for name in details["applications"] if "@" in name}


def wait_for(condition, timeout_s):
    ends_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends_s, "nothing happened"
        time.sleep(0.5)
