"""A Prometheus server before two real pools under load: every query of every board and rule has an answer, and
counters, latencies and the usage records say what the load generator saw.
"""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
import yaml
from fakes import TinyShape, random_prompt_ids, write_student
from rich.console import Console

from swiftkv.cli.top import render
from swiftkv.cluster import choose_ports, start_cluster, stop_cluster
from swiftkv.loadgen.answers import Request, find_percentile
from swiftkv.loadgen.replay import run_open
from swiftkv.metrics import METRICS
from swiftkv.metrics.foreign import FOREIGN
from swiftkv.metrics.reading import find_endpoints, look
from swiftkv.registry.storage import Storage
from swiftkv.serving.deploy import deploy_config
from swiftkv.serving.gateway.keys import create_key
from swiftkv.serving.usage.summing import read_usage, sum_usage

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
sys.path.insert(0, str(DASHBOARDS))

from boards import BOARDS  # noqa: E402
from render import draw_board, fill_in  # noqa: E402
from rules import RECORDINGS  # noqa: E402

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.engine,
    pytest.mark.skipif(not shutil.which("prometheus"), reason="on Debian: apt install prometheus"),
]

EXPORT_S = 25.0
"""Until what has happened is in Prometheus: Ray's agents export every 10 s and are scraped every 5."""
NUM_REQUESTS, DURATION_S = 80, 40.0
TARGETS = {"ttft_s": 5, "tpot_s": 1}
PRICES = {"currency": "USD", "prompt": 0.1, "cached": 0.01, "completion": 0.4}
BAD_KEY = "swk_wrong"
TENANTS = ("one", "two", "three", "four", "five")

QUIET = {
    # What nothing in this stack does, so that Prometheus has no such series yet.
    "swiftkv-distillation": "no run",
    "New version's share": "no rollout",
    "a version is switched to or rejected": "no rollout",
    "Failures/s": "nothing fails",
    "Sequences thrown out/s": "nothing is thrown out",
}


class Stack:
    """What runs, and how it is asked."""

    def __init__(self, cluster, base_url, prometheus_url, keys, usage_store):
        self.cluster, self.base_url, self.keys = cluster, base_url, keys
        self.prometheus_url, self.usage_store = prometheus_url, usage_store

    def query(self, expr, at_s=None):
        """Value by labels, at this moment or an earlier one."""
        found = self._ask("query", query=expr, **({} if at_s is None else {"time": at_s}))
        return {tuple(sorted(item["metric"].items())): float(item["value"][1]) for item in found["result"]}

    def total(self, name, **labels):
        """A counter of ours, all processes together, 0 before it is there."""
        matchers = ",".join(f'{label}="{value}"' for label, value in labels.items())
        return sum(self.query(f"sum({name}{{{matchers}}})").values())

    def list_names(self):
        """Of all series that there are."""
        return set(self._ask("label/__name__/values"))

    def list_labels(self, name):
        """Labels of a metric's series."""
        return {label for series in self._ask("series", **{"match[]": name}) for label in series}

    def discovery(self):
        return self.cluster.folder / "r" / "prom_metrics_service_discovery.json"

    def _ask(self, path, **parameters):
        url = f"{self.prometheus_url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=20) as response:
            return json.load(response)["data"]


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metering")
    student = write_student(folder / "tiny", TinyShape(max_position_embeddings=2304), 2, 2)
    keys, tenants = {}, []
    for name in TENANTS:
        keys[name], digest = create_key()
        tenants.append({"name": name, "key_sha256": [digest]})
    (folder / "tenants.yaml").write_text(yaml.safe_dump({"tenants": tenants}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWIFTKV_HOME", str(folder / "home"))
        cluster = start_cluster()
        try:
            http, listens = choose_ports(2)
            base_url = deploy_config(cluster, build_config(http, student, folder))
            server = start_prometheus(folder, cluster, listens)
            try:
                yield Stack(cluster, base_url, f"http://127.0.0.1:{listens}", keys, folder / "usage")
            finally:
                server.terminate()
                server.wait()
        finally:
            stop_cluster(cluster)


def build_config(port, student, folder):
    sizes = {"kv_cache_gib": 0.06, "max_num_seqs": 8, "max_num_batched_tokens": 512}
    engine = {"dtype": "float32", "enforce_eager": True, **sizes}
    pair = {
        "model": str(student),
        "prefill": {"engine": engine | {"cpu_cores": "0"}, "num_cpus": 0.5},
        "decode": {"engine": engine | {"cpu_cores": "1"}, "num_cpus": 0.5, "max_replicas": 2},
        "hop": {"min_tokens": 20, "timeout_s": 60, "retry_s": 1},
    }
    policy = {
        "policy_function": "swiftkv.serving.autoscaling:PoolPolicy",
        "policy_kwargs": {"pair": pair, "settings": {"targets": TARGETS}},
    }
    model = {
        "routes": [{"application": "pair"}],
        "targets": TARGETS,
        "prices": PRICES,
        "capacity": {"max_in_flight_sequences": 16},
    }
    gateway = {
        "models": {"tiny": model},
        "limits": {"ttft_target_s": None},
        "tenants_file": str(folder / "tenants.yaml"),
        "usage_store": str(folder / "usage"),
        "num_replicas": 2,
    }
    applications = [
        {
            "name": "pair",
            "route_prefix": None,
            "import_path": "swiftkv.serving.app:build_pair_version",
            "args": pair,
            "autoscaling_policy": policy,
        },
        {
            "name": "gateway",
            "route_prefix": "/",
            "import_path": "swiftkv.serving.gateway.app:build_gateway_app",
            "args": gateway,
        },
    ]
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": applications,
    }


def start_prometheus(folder, cluster, port):
    """With the shipped configuration and rules, except where Ray's file is and how often it looks."""
    config = yaml.safe_load((DASHBOARDS / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "5s", "evaluation_interval": "5s"}
    discovery = cluster.folder / "r" / "prom_metrics_service_discovery.json"
    config["scrape_configs"][0]["file_sd_configs"] = [{"files": [str(discovery)], "refresh_interval": "5s"}]
    for name in config["rule_files"]:
        shutil.copy(DASHBOARDS / "prometheus" / name, folder / name)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    log = (folder / "prometheus.log").open("wb")
    server = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=2).close()
            return server
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < deadline and server.poll() is None, (folder / "prometheus.log").read_text()
            time.sleep(0.2)


@pytest.fixture(scope="module")
def load(stack):
    """The load's answers, what counters and two looks said before and after, and a time in its middle: some gauges are
    not there while engines have nothing to do. Some requests are refused; before it a prompt comes twice, for caches.
    """
    rng = random.Random(3)
    warm = [build_request(stack, rng, index, 0.5 * index) for index in range(6)]
    again = Request(warm[1].body | {"prompt": random_prompt_ids(rng, 300)}, 4.0, "one", key=stack.keys["one"])
    run_open(stack.base_url, [*warm, again, replace(again, arrival_s=6.0)])
    time.sleep(EXPORT_S)
    before = read_counters(stack)
    first_look = look(find_endpoints(stack.discovery()))
    at = [index * DURATION_S / NUM_REQUESTS for index in range(NUM_REQUESTS)]
    requests = [build_request(stack, rng, index, arrival) for index, arrival in enumerate(at)]
    refused = [
        Request({"model": "tiny", "prompt": "a"}, 1.0, "refused", key=BAD_KEY),
        Request({"model": "absent", "prompt": "a"}, 2.0, "refused", key=stack.keys["one"]),
    ]
    middle_s = time.time() + 0.75 * DURATION_S
    answers = run_open(stack.base_url, [*requests, *refused])
    time.sleep(EXPORT_S)
    looks = (first_look, look(find_endpoints(stack.discovery())))
    return answers, before, read_counters(stack), looks, middle_s


def build_request(stack, rng, index, arrival_s):
    tenant = TENANTS[index % 7 % len(TENANTS)]
    prompt = random_prompt_ids(rng, rng.randint(5, 400))
    body = {"model": "tiny", "prompt": prompt, "max_tokens": rng.randint(2, 12), "temperature": 0, "ignore_eos": True}
    return Request(body | {"stream": index % 4 != 0}, arrival_s, tenant, key=stack.keys[tenant])


def read_counters(stack):
    tokens = {
        (tenant, kind): stack.total("ray_swiftkv_gateway_tokens_total", tenant=tenant, kind=kind)
        for tenant in stack.keys
        for kind in ("prompt", "cached", "completion")
    }
    charges = {
        tenant: stack.total("ray_swiftkv_gateway_charges_total", tenant=tenant, currency="USD") for tenant in stack.keys
    }
    answered = {
        tenant: stack.total("ray_swiftkv_gateway_requests_total", tenant=tenant, status="200") for tenant in stack.keys
    }
    engines = {
        pool: sum(
            stack.query(f'sum({name} * on (WorkerId) group_left (pool) swiftkv:replica:info{{pool="{pool}"}})').values()
        )
        for pool, name in (("decode", "ray_vllm_generation_tokens_total"), ("prefill", "ray_vllm_prompt_tokens_total"))
    }
    hops = {way: stack.total("ray_swiftkv_hop_prompts_total", way=way) for way in ("remote", "local")}
    return {"tokens": tokens, "charges": charges, "answered": answered, "engines": engines, "hops": hops}


def count_grown(load, name, key):
    _, before, after, *_ = load
    return after[name][key] - before[name][key]


def list_complete(load, tenant=None):
    complete = [answer for answer in load[0] if answer.outcome == "complete"]
    return [answer for answer in complete if tenant in (None, answer.request.label)]


def test_the_load_was_answered(load):
    assert len(list_complete(load)) == NUM_REQUESTS, {a.reason for a in load[0] if a.outcome != "complete"}


@pytest.mark.parametrize("tenant", TENANTS)
def test_counters_grow_by_exactly_what_each_tenant_was_answered(load, tenant):
    answers = list_complete(load, tenant)
    assert count_grown(load, "answered", tenant) == len(answers)
    prompt = sum(len(answer.request.body["prompt"]) for answer in answers)
    completion = sum(answer.request.body["max_tokens"] for answer in answers)
    assert count_grown(load, "tokens", (tenant, "prompt")) == prompt
    assert count_grown(load, "tokens", (tenant, "completion")) == completion
    charged = (prompt * PRICES["prompt"] + completion * PRICES["completion"]) / 1e6
    assert count_grown(load, "charges", tenant) == pytest.approx(charged, rel=1e-6)


def test_only_prompts_that_came_before_count_as_cached(load):
    """Not those whose KV came from the prefill pool."""
    _, before, *_ = load
    assert before["tokens"]["one", "cached"] > 0
    assert [count_grown(load, "tokens", (tenant, "cached")) for tenant in TENANTS] == [0] * len(TENANTS)


def test_engines_counted_the_same_tokens(load):
    answers = list_complete(load)
    assert count_grown(load, "engines", "decode") == sum(a.request.body["max_tokens"] for a in answers)
    assert sum(count_grown(load, "hops", way) for way in ("remote", "local")) == len(answers)
    long = [len(a.request.body["prompt"]) for a in answers if len(a.request.body["prompt"]) >= 20]
    assert count_grown(load, "hops", "remote") == len(long)
    assert count_grown(load, "engines", "prefill") == sum(long)


def test_usage_records_sum_to_the_same(stack, load):
    """All requests of tenants since the gateways began, the warm ones and the one for no model included."""
    from datetime import UTC, datetime, timedelta

    now = datetime.now(UTC)
    records = read_usage(Storage(stack.usage_store), now - timedelta(hours=2), now + timedelta(hours=1))
    rows = {(row["tenant"], row["status"]): row for row in sum_usage(records, ["tenant", "status"])}
    assert rows["one", 404]["requests"] == 1
    for tenant in stack.keys:
        row = rows[tenant, 200]
        assert row["requests"] == load[2]["answered"][tenant]
        for kind in ("prompt", "completion"):
            assert row[f"{kind}_tokens"] == load[2]["tokens"][tenant, kind]
        tokens = {"prompt": row["prompt_tokens"] - row["cached_tokens"], "cached": row["cached_tokens"]}
        tokens["completion"] = row["completion_tokens"]
        charge = sum(tokens[kind] * Decimal(str(PRICES[kind])) for kind in tokens) / 1_000_000
        assert row["charges"] == {"USD": charge}
        assert load[2]["charges"][tenant] == pytest.approx(float(charge), rel=1e-6)


def test_seconds_of_engines_are_their_lives_and_every_tenant_has_some(stack, load):
    """Each ledger, between two of its writings, against the clock; and what is exported of all of them."""
    before = read_ledgers(stack)
    requests = [build_request(stack, random.Random(index), index, 0.2 * index) for index in range(50)]
    run_open(stack.base_url, requests)
    time.sleep(2)
    after = read_ledgers(stack)
    assert len(before) == len(after) >= 2
    for path, (at_s, rows) in after.items():
        lived = at_s - before[path][0]
        told = sum(seconds for _, _, seconds in rows) - sum(seconds for _, _, seconds in before[path][1])
        print(f"\n{told:.2f} s in accounts, {lived:.2f} s passed")
        assert told == pytest.approx(lived, rel=0.02)
    time.sleep(EXPORT_S)
    exported = stack.query("sum by (tenant, phase) (ray_swiftkv_replica_seconds_total)")
    seconds = {tuple(value for _, value in sorted(labels)): value for labels, value in exported.items()}
    assert {tenant for _, tenant in seconds} == {*stack.keys, "-"}
    assert {phase for phase, _ in seconds} >= {"prefill", "decode", "idle"}
    for tenant in stack.keys:
        assert seconds["decode", tenant] > 0 and seconds["prefill", tenant] > 0
    for (phase, tenant), value in seconds.items():
        if tenant != "-":
            in_ledgers = sum(s for _, rows in after.values() for t, p, s in rows if (t, p) == (tenant, phase))
            assert value == pytest.approx(in_ledgers, rel=1e-6), (tenant, phase)


def read_ledgers(stack):
    """When each was written, and its rows, by its path."""
    found = {}
    for path in stack.cluster.folder.rglob("swiftkv-ledger-*/ledger.json"):
        if time.time() - path.stat().st_mtime < 3:  # of an engine that runs
            found[path] = (path.stat().st_mtime, json.loads(path.read_text()))
    return found


def test_ttft_is_within_a_bucket_of_what_clients_saw(stack, load):
    seen = [answer.ttft_s for answer in list_complete(load) if answer.request.body["stream"]]
    (told,) = stack.query(
        "histogram_quantile(0.5, sum by (le) (increase(ray_swiftkv_gateway_ttft_seconds_bucket[2m])))"
    ).values()
    edges = [0.0, *METRICS["swiftkv_gateway_ttft_seconds"].boundaries, math.inf]
    place = next(index for index, edge in enumerate(edges) if find_percentile(seen, 50) <= edge)
    assert edges[max(0, place - 2)] <= told <= edges[min(place + 1, len(edges) - 1)]


def list_queries():
    for board in BOARDS:
        for panel in board.panels:
            for number, query in enumerate(panel.queries):
                yield board.uid, panel.title, number, query.expr
        for title, expr in board.annotations.items():
            yield board.uid, title, 0, expr
    for rule in RECORDINGS:
        yield "rules", rule.name, 0, rule.expr


@pytest.mark.parametrize(("uid", "title", "number", "expr"), list(list_queries()), ids=lambda value: str(value)[:40])
def test_every_query_has_an_answer(stack, load, uid, title, number, expr):
    found = stack.query(fill_in(expr, 300), at_s=load[4])
    if reason := QUIET.get(title) or QUIET.get(uid):
        assert len(found) <= 1 and not any(found.values()), f"said to be quiet ({reason}); take it out of QUIET"
    elif title in ("wanted replicas change", "Why"):
        pass  # they have marks and reasons when there are some
    else:
        assert found, f"no series: {expr}"


def test_every_metric_of_the_table_and_of_others_is_there_with_its_labels(stack, load):
    absent = {"distill", "rollout"}
    names = stack.list_names()
    quiet = {"swiftkv_hop_failures_total", "swiftkv_usage_lost_tokens_total"}
    for metric in METRICS.values():
        if metric.name.split("_")[1] in absent or metric.name in quiet:
            continue
        for name in metric.exported_names:
            assert name in names, name
            assert set(metric.labels) <= stack.list_labels(name), name
    quiet = {"preemptions", "failed_transfers", "kv_expired"}
    for metric in FOREIGN.values():
        if not any(word in metric.exported_name for word in quiet):
            for name in metric.exported_names:
                assert name in names, f"{name} (seen in {metric.seen_in})"
                assert set(metric.labels) <= stack.list_labels(name), name


def test_no_alert_fires_for_a_stack_that_is_well(stack, load):
    assert stack.query('ALERTS{alertstate="firing"}') == {}


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
def test_boards_can_be_drawn(stack, load, board, tmp_path):
    """The pictures are those of the reports where SWIFTKV_PICTURES names a folder."""
    figure = draw_board(board, stack.prometheus_url, minutes=3)
    drawn = [axis for axis in figure.axes if axis.lines or axis.images]
    assert board.uid == "swiftkv-distillation" or len(drawn) >= len(board.panels) - 3
    figure.savefig(Path(os.environ.get("SWIFTKV_PICTURES", tmp_path)) / f"{board.uid}.png", dpi=110)


def test_top_shows_the_load_without_a_prometheus_server(load):
    console = Console(width=160, record=True)
    console.print(render(*load[3]))
    text = console.export_text()
    assert re.search(r"tiny .* ms", text) and re.search(r"pair +│ +prefill", text), text
    assert re.search(r"pair +│ +decode", text) and re.search(r"two +│ +[1-9]", text), text
