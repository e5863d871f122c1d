"""Everything that can break, broken under load: no request may end without its client being told, and all recovers.

A prefill replica on a Ray node of its own, two decode replicas and two gateways beside the head, all real. Processes
are killed and stopped by the ids that Serve reports; nobody repairs anything. What became of the requests is printed
and, with SWIFTKV_FAULTS_JSON, written.
"""

import asyncio
import concurrent.futures
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import openai
import psutil
import pytest
from fakes import TinyShape, random_prompt_ids, write_student
from load import Load, build_body, count_outcomes, find_wrong
from reference import load_weights

from swiftkv.cluster import choose_ports, start_cluster, stop_cluster
from swiftkv.loadgen.answers import Request
from swiftkv.loadgen.replay import run_closed
from swiftkv.serving.deploy import deploy_config

pytestmark = [pytest.mark.cluster, pytest.mark.engine, pytest.mark.soak]

LEASE_S = 5
CONTEXT_TOKENS = 16384
STEP_TOKENS = 512
DEADLINE_S = 60.0
"""Of the gateway: what takes longer is to be told so. The load's clients wait half as long again."""
EXPORT_S = 12.0
"""Ray's agents export what replicas record every 10 s."""
SMALL_CACHE = {"kv_cache_gib": 5 / 1024}
"""2,560 tokens: less than the context, and than what eight of the load's longer requests hold."""
IDLE_S = 0.3
GIVEN_UP = "vllm_nixl_num_kv_expired_reqs_total"
NODE = Path(__file__).parents[1] / "node.py"


class Fleet:
    """The running cluster, and what the tests do to it."""

    def __init__(self, cluster, student):
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

        self.cluster, self.student = cluster, student
        self._serve = ServeSubmissionClient(cluster.dashboard_url, headers=cluster.headers())
        (self._port,) = choose_ports(1)
        self.base_url = f"http://127.0.0.1:{self._port}/v1"
        self.client = self.connect()
        self.join_node()

    def connect(self):
        """A client with connections of its own."""
        return openai.OpenAI(base_url=self.base_url, api_key="none", max_retries=0, timeout=120)

    def join_node(self):
        """A node for the prefill replica, which fits no other."""
        (self.node_metrics_port,) = choose_ports(1)
        environment = psutil.Process(self.cluster.pid).environ()
        command = [sys.executable, str(NODE), self.cluster.address, "3", str(self.node_metrics_port)]
        self.node = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        wait_for(lambda: self.count_nodes() == 2)

    def count_nodes(self):
        request = urllib.request.Request(
            f"{self.cluster.dashboard_url}/nodes?view=summary", headers=self.cluster.headers()
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            nodes = json.load(response)["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)

    def deploy(self, **engine):
        """Two pools with such engines, behind the gateway, once they run."""
        sizes = {"kv_cache_gib": 0.06, "max_num_seqs": 8, "max_num_batched_tokens": STEP_TOKENS, **engine}
        engine = {"dtype": "float32", "enforce_eager": True, **sizes}
        decode = {"engine": engine | {"cpu_cores": "1"}, "num_cpus": 1, "min_replicas": 2, "max_replicas": 2}
        pair = {
            "model": str(self.student),
            "kv_lease_s": LEASE_S,
            "prefill": {"engine": engine | {"cpu_cores": "0"}, "num_cpus": 3},
            "decode": decode,
            "hop": {"min_tokens": 20, "timeout_s": 10, "transfer_timeout_s": 5, "retry_s": 1},
        }
        capacity = {"max_in_flight_sequences": 16, "prompt_tokens_per_s": 10_000}
        gateway = {
            "models": {"tiny": {"routes": [{"application": "pair"}], "capacity": capacity}},
            "limits": {"ttft_target_s": None, "deadline_s": DEADLINE_S},
            "num_replicas": 2,
        }
        applications = [
            build_application("pair", None, "swiftkv.serving.app:build_pair_version", pair),
            build_application("gateway", "/", "swiftkv.serving.gateway.app:build_gateway_app", gateway),
        ]
        options = {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": self._port}}
        deploy_config(self.cluster, options | {"applications": applications})

    def find_pids(self, prefix):
        """The processes of the running replicas of the deployment whose name begins so; none while Serve is away."""
        try:
            applications = self._serve.get_serve_details()["applications"]
        except Exception:  # whatever Ray's client makes of a controller that is gone
            return []
        return [
            replica["pid"]
            for application in applications.values()
            for name, deployment in application["deployments"].items()
            if name.startswith(prefix)
            for replica in deployment["replicas"]
            if replica["state"] == "RUNNING" and psutil.pid_exists(replica["pid"])
        ]

    def find_controller(self):
        log = self._serve.get_serve_details()["controller_info"]["log_file_path"]
        return int(re.search(r"controller_(\d+)", log)[1])

    def find_engines(self, prefix):
        """The processes that compute and move KV, of a deployment's replicas."""
        children = (psutil.Process(pid).children(recursive=True) for pid in self.find_pids(prefix))
        return [child for found in children for child in found if "VLLM::" in " ".join(child.cmdline())]

    def wait_for_replicas(self, prefix, count, absent=()):
        wait_for(lambda: len(set(self.find_pids(prefix)) - set(absent)) == count, timeout_s=240)

    def read_metric(self, name, on_node=False, **labels):
        """What Ray's agent exports of a metric, all replicas of the head or of the second node together."""
        words = psutil.Process(self.cluster.pid).cmdline()
        port = self.node_metrics_port if on_node else words[words.index("--metrics-export-port") + 1]
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        found = [line for line in lines if line.startswith(f"ray_{name}{{") and all(label in line for label in wanted)]
        return sum(float(line.rpartition(" ")[2]) for line in found)


def build_application(name, route_prefix, import_path, args):
    return {"name": name, "route_prefix": route_prefix, "import_path": import_path, "args": args}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    shape = TinyShape(max_position_embeddings=CONTEXT_TOKENS)
    return write_student(tmp_path_factory.mktemp("models") / "tiny", shape, 2, 2)


@pytest.fixture(scope="module")
def weights(student):
    return load_weights(student)


@pytest.fixture(scope="module")
def report():
    """What became of each fault's requests, written at the end."""
    results = {}
    yield results
    print("\n" + json.dumps(results, indent=2))
    if path := os.environ.get("SWIFTKV_FAULTS_JSON"):
        Path(path).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory, student, report):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWIFTKV_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("UCX_TLS", "tcp")  # as between machines; otherwise KV moves through shared memory
        cluster = start_cluster(num_cpus=2)
        try:
            fleet = Fleet(cluster, student)
            fleet.deploy()
            yield fleet
        finally:
            stop_cluster(cluster)


@pytest.fixture
def under_load(fleet, weights, report, request):
    """Runs a fault under load; afterwards nothing may have been lost silently and all must be as before."""

    @contextmanager
    def run(**load):
        name = request.node.name.removeprefix("test_")
        with Load(fleet.base_url, deadline_s=1.5 * DEADLINE_S, **load) as running:
            time.sleep(5)
            began_s = time.monotonic()
            yield running
            recovered_s, recovered = time.monotonic() - began_s, running.sent
            time.sleep(8)
        reasons = sorted({f"{a.outcome}: {a.reason[:160]}" for a in running.answers if a.outcome != "complete"})
        counts = count_outcomes(running.answers)
        report[name] = {"sent": running.sent, **counts, "recovered_s": round(recovered_s, 1), "reasons": reasons}
        print(f"\n{name}: {report[name]}")
        assert counts["silent"] == 0 and len(running.answers) == running.sent, reasons
        for refused in filter(None, (re.match(r"\d{3}: (.*)", answer.reason, re.S) for answer in running.answers)):
            assert json.loads(refused[1])["error"]["message"]  # of our servers, Ray's or HAProxy's making
        assert not find_wrong(running.answers, weights)
        after = count_outcomes(running.answers, since=recovered)
        assert after["complete"] == sum(after.values()) > 0, reasons

    return run


def wait_for(condition, timeout_s=60.0, every_s=0.5):
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(every_s)
    return value


def kill(pid):
    """The process with its children, as a machine that is lost takes all."""
    process = psutil.Process(pid)
    for victim in [*process.children(recursive=True), process]:
        victim.send_signal(signal.SIGKILL)


def wait_until_idle(processes, timeout_s):
    """Seconds until the processes compute no more: from then on for IDLE_S all together take less than a tenth."""
    began_s, samples = time.monotonic(), []
    while True:
        samples.append((time.monotonic(), sum(sum(process.cpu_times()[:2]) for process in processes)))
        window = [sample for sample in samples if sample[0] >= samples[-1][0] - IDLE_S]
        if len(window) < len(samples) and window[-1][1] - window[0][1] < IDLE_S / 10:
            return window[0][0] - began_s
        assert samples[-1][0] - began_s < timeout_s, "the engines go on computing"
        time.sleep(0.02)


def open_stream(fleet, seed, prompt_tokens, num_tokens=12_000):
    """A stream that goes on for minutes."""
    return complete(fleet, random_prompt_ids(random.Random(seed), prompt_tokens), num_tokens, stream=True)


def complete(fleet, prompt, num_tokens, client=None, **options):
    """A completion through the official client, the fleet's if none is given."""
    body = build_body(prompt, num_tokens)
    extra = {key: body.pop(key) for key in ("ignore_eos", "return_token_ids")}
    return (client or fleet.client).completions.create(**body, extra_body=extra, **options)


def test_nothing_is_lost_without_a_fault(fleet, under_load):
    with under_load() as load:
        time.sleep(5)
    assert count_outcomes(load.answers)["complete"] == load.sent
    assert fleet.read_metric("swiftkv_hop_prompts_total", way="remote") > 0


def test_prefill_replica_killed(fleet, under_load):
    (pid,) = fleet.find_pids("Prefill:")
    with under_load() as load:
        kill(pid)
        fleet.wait_for_replicas("Prefill:", 1, absent=[pid])
    assert count_outcomes(load.answers)["complete"] == load.sent  # prefilled elsewhere: slower, never down


def test_decode_replica_killed(fleet, under_load):
    """Answers of which nothing was sent are given elsewhere; streams that had begun end with an error event."""
    pids = fleet.find_pids("Decode:")
    with under_load(rate_per_s=1, answers=(60, 120)) as load:
        kill(pids[0])
        fleet.wait_for_replicas("Decode:", 2, absent=pids[:1])
    for answer in load.answers:
        assert answer.outcome == "complete" or (answer.outcome == "told" and answer.chunk_s), answer.reason


@pytest.mark.parametrize("fate", ["stopped", "killed"])
def test_transfer_cut(fleet, under_load, fate):
    """Prompts are prefilled, their answers are on the way, and the engine that holds their KV is gone."""
    (pid,) = fleet.find_pids("Prefill:")
    engine = fleet.find_engines("Prefill:")
    replica = psutil.Process(pid)
    with under_load() as load:
        replica.suspend()
        time.sleep(1.5)  # the engine finishes what it was given, and cannot say so
        for process in engine:
            process.suspend() if fate == "stopped" else process.kill()
        replica.resume()
        if fate == "killed":
            fleet.wait_for_replicas("Prefill:", 1, absent=[pid])
        else:
            time.sleep(12)
            for process in engine:
                process.resume()
    assert count_outcomes(load.answers)["complete"] == load.sent
    wait_for(lambda: fleet.read_metric("vllm_kv_cache_usage_perc") == 0, timeout_s=60)


def test_node_removed(fleet, under_load):
    """The pool carries on alone until another machine joins."""
    (pid,) = fleet.find_pids("Prefill:")
    with under_load():
        kill(fleet.node.pid)
        fleet.node.wait()
        time.sleep(15)
        fleet.join_node()
        fleet.wait_for_replicas("Prefill:", 1, absent=[pid])
        fleet.wait_for_replicas("gateway", 2)


def test_gateway_killed(fleet, under_load):
    """Its connections break off, which clients report; the other gateway goes on."""
    pids = fleet.find_pids("gateway")
    with under_load(rate_per_s=1, answers=(60, 120)):
        kill(pids[0])
        fleet.wait_for_replicas("gateway", 2, absent=pids[:1])


def test_a_killed_gateway_s_requests_end(fleet, report):
    """Streams break off; who waits for an answer in one piece is told by HAProxy, as OpenAI tells it.

    On a connection that had answers before HAProxy closes it instead, upon which HTTP clients may send again.
    """
    engines = fleet.find_engines("Decode:")
    pids = fleet.find_pids("gateway")
    fresh = fleet.connect()
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        whole = threads.submit(complete, fleet, random_prompt_ids(random.Random(310), 100), 12_000, client=fresh)
        streams = [open_stream(fleet, 300 + seed, 100) for seed in range(4)]
        for stream in streams:
            next(iter(stream))
        for pid in pids:
            kill(pid)
        report["killed_gateway_engine_idle_s"] = round(wait_until_idle(engines, timeout_s=10), 2)
    for stream in streams:
        with pytest.raises(Exception, match="peer closed|incomplete|Connection|connection"):
            list(stream)
    assert whole.exception().status_code == 503 and whole.exception().code == "unavailable", whole.exception()
    fleet.wait_for_replicas("gateway", 2, absent=pids)


def test_controller_killed(fleet, under_load):
    """Requests go on without it; it comes back, and still replaces what dies.

    Ray's HAProxy may be told of no gateway for a moment while the new controller finds them: that is a 503 with
    Retry-After (1 of 136 once, none of 145 before).
    """
    pid = fleet.find_controller()
    (prefill,) = fleet.find_pids("Prefill:")
    with under_load() as load:
        kill(pid)
        wait_for(lambda: fleet.find_pids("Prefill:") and fleet.find_controller() != pid, timeout_s=120)
        kill(prefill)
        fleet.wait_for_replicas("Prefill:", 1, absent=[prefill])
    for answer in load.answers:
        assert answer.outcome == "complete" or '"code": "unavailable"' in answer.reason, answer.reason


def test_slow_clients_hold_up_nobody(fleet, under_load, report):
    """They read a line a second; what is kept for them has a bound, and in the end they get it all."""
    gateways = [psutil.Process(pid) for pid in fleet.find_pids("gateway")]
    before = sum(process.memory_info().rss for process in gateways)

    async def read_slowly(seed):
        body = build_body(random_prompt_ids(random.Random(seed), 100), 1500) | {"stream": True}
        data, port = json.dumps(body).encode(), int(fleet.base_url.split(":")[2].split("/")[0])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n"
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
        for _ in range(20):
            await reader.readline()
            await asyncio.sleep(1)
        rest = await reader.read()
        writer.close()
        return b"data: [DONE]" in rest

    async def read_all():
        return await asyncio.gather(*(read_slowly(seed) for seed in range(4)))

    with under_load() as load:
        assert all(asyncio.run(read_all()))
    grown = sum(process.memory_info().rss for process in gateways) - before
    report["slow_clients_gateway_growth_mb"] = round(grown / 1e6, 1)
    assert count_outcomes(load.answers)["complete"] == load.sent
    assert grown < 100e6


@pytest.mark.parametrize("stage", ["decode", "prefill", "whole"])
def test_engines_stop_for_clients_that_leave(fleet, report, stage):
    """In the middle of a stream, of a long prompt of which each step has STEP_TOKENS, and of an answer sent whole."""
    engines = fleet.find_engines("Decode:") + fleet.find_engines("Prefill:")
    wait_until_idle(engines, timeout_s=30)
    seconds = []
    for seed in range(6):
        if stage == "decode":
            stream = open_stream(fleet, 400 + seed, 300)
            next(iter(stream))
            stream.close()
        elif stage == "prefill":
            leave_while_prefilling(fleet, engines, seed)
        else:
            with pytest.raises(openai.APITimeoutError):
                complete(fleet, random_prompt_ids(random.Random(600 + seed), 100), 1000, timeout=0.5)
        seconds.append(round(wait_until_idle(engines, timeout_s=20), 3))
    report[f"cancelled_in_{stage}_engine_idle_s"] = seconds
    print(f"\n{stage}: engines idle after {seconds}")
    assert max(seconds) < 1.0


def leave_while_prefilling(fleet, engines, seed):
    """Sends a prompt of many steps and leaves when an engine is at it."""
    busy = sum(sum(process.cpu_times()[:2]) for process in engines)

    async def leave():
        body = build_body(random_prompt_ids(random.Random(500 + seed), 15_000), 8) | {"stream": True}
        data, port = json.dumps(body).encode(), int(fleet.base_url.split(":")[2].split("/")[0])
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
        while sum(sum(process.cpu_times()[:2]) for process in engines) < busy + 0.1:
            await asyncio.sleep(0.005)
        writer.close()

    asyncio.run(leave())


def test_kv_of_clients_that_left_is_freed_within_a_lease(fleet, report):
    """Clients leave at any moment of the hop, some of them between prefill and pull."""
    rng = random.Random(7)

    def leave(_):
        with pytest.raises(openai.APITimeoutError):
            complete(fleet, random_prompt_ids(rng, 3000), 1000, timeout=rng.uniform(0.1, 1.0))

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(leave, range(40)))
    engines = fleet.find_engines("Decode:") + fleet.find_engines("Prefill:")
    report["kv_of_left_clients_freed_s"] = round(wait_until_freed(fleet, engines, timeout_s=LEASE_S + 1), 1)


def test_kv_for_killed_decode_replicas_is_freed_within_a_lease(fleet, report):
    """Their engines pull no more, so that KV waits for them, and then they are killed."""
    pids, rng = fleet.find_pids("Decode:"), random.Random(8)
    prompts = [random_prompt_ids(rng, 3000) for _ in range(8)]
    prefill, decode = fleet.find_engines("Prefill:"), fleet.find_engines("Decode:")
    given_up = fleet.read_metric(GIVEN_UP, on_node=True)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        requests = [Request(build_body(prompt, 8), label=str(i)) for i, prompt in enumerate(prompts)]
        answers = threads.submit(run_closed, fleet.base_url, requests, len(requests))
        time.sleep(0.3)
        for engine in decode:
            engine.suspend()
        time.sleep(2)
        for pid in pids:
            kill(pid)
        seconds = wait_until_freed(fleet, prefill, timeout_s=LEASE_S + 5, nodes=[True])
        report["kv_for_killed_decode_replicas_freed_s"] = round(seconds, 1)
        counts = count_outcomes(answers.result())
    assert fleet.read_metric(GIVEN_UP, on_node=True) > given_up  # there was KV that nobody pulled
    assert counts["silent"] == counts["broken"] == 0, counts
    fleet.wait_for_replicas("Decode:", 2, absent=pids)


def wait_until_freed(fleet, engines, timeout_s, nodes=(True, False)):
    """Seconds until the engines hold no KV: one that does steps on. Then what they tell must agree, however late."""
    seconds = wait_until_idle(engines, timeout_s)
    wait_for(lambda: all(fleet.read_metric("vllm_kv_cache_usage_perc", on_node) == 0 for on_node in nodes))
    return seconds


def test_rolling_update(fleet, under_load):
    """Every engine is replaced by one with a smaller KV cache; long streams end where they began."""
    before = fleet.find_pids("Decode:") + fleet.find_pids("Prefill:")
    with under_load() as load, concurrent.futures.ThreadPoolExecutor(2) as threads:
        streams = [threads.submit(list, open_stream(fleet, 700 + seed, 100, 6000)) for seed in range(2)]
        fleet.deploy(**SMALL_CACHE)
        fleet.wait_for_replicas("Decode:", 2, absent=before)
        fleet.wait_for_replicas("Prefill:", 1, absent=before)
        reasons = [chunk.choices[0].finish_reason for stream in streams for chunk in stream.result() if chunk.choices]
    assert reasons.count("length") == len(streams)
    assert count_outcomes(load.answers)["complete"] == load.sent


def test_full_kv_cache(fleet, weights, report):
    """More sequences than blocks: some are preempted and all complete. What could never fit is refused."""
    fleet.deploy(**SMALL_CACHE)  # as they are already after the test before
    rng = random.Random(9)
    bodies = [build_body(random_prompt_ids(rng, 300), 300) for _ in range(24)]
    answers = run_closed(fleet.base_url, [Request(body, label=str(i)) for i, body in enumerate(bodies)], 16)
    report["full_kv_cache"] = {"sent": len(answers), **count_outcomes(answers)}
    assert count_outcomes(answers)["complete"] == len(answers), [answer.reason for answer in answers]
    assert not find_wrong(answers, weights, most=8)
    wait_for(lambda: fleet.read_metric("vllm_num_preemptions_total") > 0, timeout_s=EXPORT_S + 5)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        fleet.client.completions.create(model="tiny", prompt=random_prompt_ids(rng, 3000), max_tokens=1)
