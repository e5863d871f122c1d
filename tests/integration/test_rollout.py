"""A rollout on a real Ray Serve cluster: gateway with two replicas, a real registry, stand-ins where engines would be.

One cluster serves every test, under one load from the first to the last of which no request may fail. Each test
moves the alias once more, from whichever version the tests before it left.
"""

import asyncio
import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from fakes import TinyShape, write_student
from logs import read_all

pytestmark = pytest.mark.cluster

HERE = Path(__file__).parent
BEHAVIOURS = {"error_rate": "fails", "ttft": "slow", "agreement": "disagrees"}
"""What a version does that is rejected for a reason."""
SHARE = 0.3
MIN_REQUESTS = 40


class StandIn:
    """Answers as Ray Serve LLM's server does, with one word that every version has, but for one that disagrees."""

    def __init__(self, behaviour):
        self.behaviour = behaviour
        self.number = 0

    async def check_health(self):
        pass

    async def completions(self, request, raw_request_info=None):
        self.number += 1
        if self.behaviour == "fails" and self.number % 2 and not request.request_id.startswith("warm"):
            raise RuntimeError("a broken version")
        await asyncio.sleep(0.2 if self.behaviour == "slow" else 0.02)
        text = "other" if self.behaviour == "disagrees" else "word"
        if not request.stream:
            yield self._answer(request, text)
            return
        yield [self._event(request, [{"index": 0, "text": text, "logprobs": None, "finish_reason": None}])]
        await asyncio.sleep(0.01)
        yield [self._event(request, [{"index": 0, "text": text, "logprobs": None, "finish_reason": "stop"}])]
        yield [self._event(request, [], usage={"prompt_tokens": 1, "completion_tokens": 2})]
        yield ["data: [DONE]\n\n"]

    def _event(self, request, choices, **more):
        values = {"id": request.request_id, "object": "text_completion", "created": 1, "model": "tiny"}
        return "data: " + json.dumps(values | {"choices": choices} | more, separators=(",", ":")) + "\n\n"

    def _answer(self, request, text):
        from ray.llm._internal.serve.core.configs.openai_api_models import CompletionResponse

        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        return CompletionResponse(id=request.request_id, model="tiny", usage=usage, choices=[choice])


def build_stand_in(arguments):
    """What the rollout's template names. Only the cluster calls it."""
    from ray import serve

    behaviours = json.loads(Path(os.environ["STAND_IN_BEHAVIOURS"]).read_text())
    behaviour = behaviours.get(arguments["model"].partition("@")[2], "good")
    options = {"num_cpus": 0}
    return serve.deployment(StandIn, name="version", max_ongoing_requests=1000, ray_actor_options=options).bind(
        behaviour
    )


class Load:
    """Streams requests from several clients without a pause, in a thread of its own."""

    def __init__(self, url, num_clients=6):
        self.answers = []
        """Application, status, and whether the stream was whole."""
        self._url = url
        self._num_clients = num_clients
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()

    def stop(self):
        self._is_over.set()
        self._thread.join()

    def take(self):
        """What came since the last call, counted."""
        taken, self.answers = self.answers, []
        return Counter(taken)

    async def _run(self):
        async with httpx.AsyncClient(base_url=self._url, timeout=60) as client:
            await asyncio.gather(*(self._send(client) for _ in range(self._num_clients)))

    async def _send(self, client):
        body = {"prompt": [1], "stream": True, "max_tokens": 2}
        while not self._is_over.is_set():
            try:
                response = await client.post("/v1/completions", json=body)
                is_whole = response.text.endswith("data: [DONE]\n\n")
                self.answers.append((response.headers.get("x-swiftkv-application"), response.status_code, is_whole))
            except httpx.HTTPError as error:
                self.answers.append((type(error).__name__, 0, False))


class World:
    """The running cluster, its registry and its load."""

    def __init__(self, client, cluster, home, folder, url):
        from swiftkv.registry.registry import Registry

        self.client = client
        self.cluster = cluster
        self.home = home
        self.registry = Registry(home / "registry")
        self.url = url
        self._folder = folder
        self._behaviours = {}
        self.load = None

    @property
    def behaviours_file(self):
        """Tells the stand-ins of each version what they do."""
        return self.home / "behaviours.json"

    def release(self, behaviour="good", damage=lambda version: None):
        """Publishes the next version and moves the alias to it; its number. `damage` is done before."""
        version = self.registry.publish(self._folder, "tiny").version
        self._behaviours[version] = behaviour
        self.behaviours_file.write_text(json.dumps(self._behaviours))
        damage(version)
        self.registry.set_alias("tiny", "production", version)
        return version

    def find_serving(self):
        """The one version that has an application."""
        (application,) = self.find_versions()
        return application.partition("@")[2]

    def find_versions(self):
        return {name for name in self.client.get_serve_details()["applications"] if "@" in name}

    def read_events(self, version):
        """What the rollout wrote of a version, by event."""
        texts = read_all(self.cluster.folder.glob("r/session_*/logs/worker-*.err"))
        lines = (line for text in texts for line in text.splitlines() if line.startswith('{"event"'))
        found = [line for line in map(json.loads, lines) if line["version"] == version]
        return {line["event"]: line for line in found}

    def wait_for_event(self, event, version, timeout_s=120):
        ends_s = time.monotonic() + timeout_s
        while event not in (events := self.read_events(version)):
            assert time.monotonic() < ends_s, f"{version} was not {event}: {events}\n{self.describe()}"
            time.sleep(0.2)
        return events[event]

    def describe(self):
        return json.dumps(self.client.get_serve_details()["applications"], indent=1)[:20000]

    def wait_until_only(self, version):
        """Until no other version has an application, and it has answered everything since."""
        application = f"tiny@{version}"
        ends_s = time.monotonic() + 60
        while self.find_versions() != {application}:
            assert time.monotonic() < ends_s, self.describe()
            time.sleep(0.2)
        self.take_whole()
        time.sleep(2)
        assert set(self.take_whole()) == {application}

    def find_pid(self):
        (replica,) = self.client.get_serve_details()["applications"]["rollout"]["deployments"]["rollout"]["replicas"]
        return replica["pid"]

    def take_whole(self):
        """Answers since the last call by application; all must be whole."""
        counts = self.load.take()
        assert {(status, is_whole) for _, status, is_whole in counts} <= {(200, True)}, counts
        return Counter({application: number for (application, _, _), number in counts.items()})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    from prometheus_server import watch  # replicas import this file, and know no dashboards
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    from swiftkv.cluster import choose_ports, start_cluster, stop_cluster

    home = tmp_path_factory.mktemp("rollout")
    folder = write_student(home / "tiny", TinyShape(), 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWIFTKV_HOME", str(home))
        patch.setenv("OMP_NUM_THREADS", "1")
        cluster = start_cluster(num_cpus=2)
        try:
            (port,) = choose_ports(1)
            client = ServeSubmissionClient(cluster.dashboard_url, headers=cluster.headers())
            world = World(client, cluster, home, folder, f"http://127.0.0.1:{port}")
            version = world.release()
            client.deploy_applications(build_config(port, world.behaviours_file))
            world.wait_for_event("switched", version, timeout_s=180)
            wait_until_ready(world)
            world.load = Load(world.url)
            with watch(cluster, home / "prometheus") as world.prometheus:
                yield world
        finally:
            if world.load:
                world.load.stop()
            stop_cluster(cluster)


def build_config(port, behaviours_file):
    rollout = {
        "model": "tiny",
        "version": {
            "import_path": "test_rollout:build_stand_in",
            "runtime_env": {
                "env_vars": {"PYTHONPATH": f"{HERE}:{HERE.parent}", "STAND_IN_BEHAVIOURS": str(behaviours_file)}
            },
        },
        "share_frac": SHARE,
        "min_requests": MIN_REQUESTS,
        "compared_frac": 1,
        "min_compared": 10,
        "warm_prompt_tokens": 10,
        "poll_s": 0.5,
        # Generous, because two cores carry everything: what is bad here is bad by far.
        "bounds": {"max_error_increase_frac": 0.05, "max_ttft_ratio": 2, "max_tpot_ratio": 2},
    }
    gateway = {"models": {"tiny": {}}, "num_replicas": 2, "lease_s": 1, "limits": {"ttft_target_s": None}}
    applications = [
        build_application("rollout", None, "swiftkv.serving.rollout.app:build_rollout_app", rollout),
        build_application("gateway", "/", "swiftkv.serving.gateway.app:build_gateway_app", gateway),
    ]
    http = {"host": "127.0.0.1", "port": port}
    return {"proxy_location": "HeadOnly", "http_options": http, "applications": applications}


def build_application(name, route_prefix, import_path, args):
    return {"name": name, "route_prefix": route_prefix, "import_path": import_path, "args": args}


def wait_until_ready(world):
    ends_s = time.monotonic() + 60
    in_a_row = 0
    while in_a_row < 10:  # both gateways have the routes
        in_a_row = in_a_row + 1 if httpx.get(f"{world.url}/ready").status_code == 200 else 0
        assert time.monotonic() < ends_s, world.describe()
        time.sleep(0.2)


def test_good_version_gets_a_share_then_everything_and_the_old_one_goes(world):
    from boards import POOLS
    from prometheus_server import list_queries, wait_for_answers

    old = world.find_serving()
    version = world.release()
    world.wait_for_event("canary", version)
    world.take_whole()
    switched = world.wait_for_event("switched", version)
    assert (switched["reason"], switched["replaced"]) == ("good", old)
    counts = world.take_whole()
    share = counts[f"tiny@{version}"] / counts.total()
    print(f"while it was watched: {dict(counts)}; {switched['figures']}")
    assert 0.1 < share < 0.6
    world.wait_for_event("removed", old)
    if world.prometheus:
        shown = list_queries(POOLS, {"New version's share"})
        both = 'sum(ray_swiftkv_rollout_decisions_total{outcome="switched"}) == 2'  # this one, and the first of all
        marks = POOLS.annotations["a version is switched to or rejected"]
        wait_for_answers(world.prometheus, [*shown, both, marks])
    world.wait_until_only(version)


@pytest.mark.parametrize(
    "reason", ["error_rate", *(pytest.param(name, marks=pytest.mark.soak) for name in ("ttft", "agreement"))]
)
def test_bad_version_is_dropped_and_not_tried_again(world, reason):
    kept = world.find_serving()
    version = world.release(BEHAVIOURS[reason])
    rejected = world.wait_for_event("rejected", version)
    print(rejected)
    assert rejected["reason"] == reason
    world.wait_for_event("removed", version)
    world.wait_until_only(kept)


@pytest.mark.soak
def test_killed_rollout_goes_on_where_it_was(world):
    old = world.find_serving()
    version = world.release()
    world.wait_for_event("starting", version)
    first = world.find_pid()
    os.kill(first, signal.SIGKILL)
    world.wait_for_event("canary", version)
    second = world.find_pid()
    assert second != first
    os.kill(second, signal.SIGKILL)
    world.wait_for_event("switched", version)
    third = world.find_pid()
    assert third != second
    os.kill(third, signal.SIGKILL)
    world.wait_for_event("removed", old)
    world.wait_until_only(version)


def test_version_whose_manifest_is_damaged_is_never_started(world):
    def damage(version):
        path = world.home / "registry" / "models" / "tiny" / "versions" / version / "manifest.json"
        path.write_text(path.read_text().replace("sha256", "sha255"))

    kept = world.find_serving()
    version = world.release(damage=damage)
    rejected = world.wait_for_event("rejected", version)
    assert rejected["reason"] == "verify"
    assert "manifest" in rejected["message"]
    world.wait_until_only(kept)
    assert "starting" not in world.read_events(version)


def test_alias_that_moves_back_ends_the_rollout(world):
    kept = world.find_serving()
    version = world.release()
    world.wait_for_event("canary", version)
    world.registry.set_alias("tiny", "production", kept)
    world.wait_for_event("removed", version)
    assert world.read_events(version).keys() == {"starting", "canary", "abandoned", "removed"}
    world.wait_until_only(kept)
