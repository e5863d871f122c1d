"""A Prometheus server before two real pools under load: every query of every board and rule has an answer, and
counters, latencies and the usage records say what the load generator saw.
"""

import json
import math
import os
import random
import re
import shutil
import time
from collections import Counter
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from boards import BOARDS
from fakes import TinyShape, random_prompt_ids, write_student
from prometheus_server import SHIPPED, run_prometheus, watch
from render import draw_board, fill_in
from rich.console import Console
from rules import RECORDINGS

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
from swiftkv.spec import SwiftKVSpec

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.engine,
    pytest.mark.skipif(not shutil.which("prometheus"), reason="on Debian: apt install prometheus"),
]

EXPORT_S = 30.0
"""Until what has happened is in Prometheus: Ray's agents export every 10 s, and are scraped as often."""
QUIET_S = EXPORT_S + 65.0
"""Until rates over a minute are zero again."""
NUM_REQUESTS, DURATION_S = 80, 40.0
TARGETS = {"ttft_s": 5, "tpot_s": 1}
PRICES = {"currency": "USD", "prompt": 0.1, "cached": 0.01, "completion": 0.4}
BAD_KEY = "swk_wrong"
TENANTS = ("one", "two", "three", "four", "five")

QUIET = {
    # What nothing in this stack does, so that Prometheus has no such series yet.
    "swiftkv-distillation": "no run; test_distill.py has one",
    "New version's share": "no rollout; test_rollout.py has some",
    "a version is switched to or rejected": "no rollout",
    "Failures/s": "nothing fails",
    "Sequences thrown out/s": "nothing is thrown out",
    "Bytes/s to and from stores": "the model is a folder; test_registry.py has a store",
    "Seconds of an operation": "the model is a folder",
    "Failed verifications so far": "the model is a folder",
}


@dataclass
class Stack:
    """What runs, and how it is asked."""

    cluster: Any
    base_url: str
    keys: dict[str, str]
    prometheus: Any
    folder: Path

    def discovery(self):
        return self.cluster.folder / "r" / "prom_metrics_service_discovery.json"


@dataclass
class Load:
    """What was sent, and what was to be seen of it."""

    answers: list
    before: dict
    after: dict
    """Counters."""
    looks: tuple
    """Without a Prometheus server."""
    middle_s: float
    """Some gauges are not there while engines have nothing to do."""
    since_s: float
    """A time at which all rates are zero, as they are at the next."""
    until_s: float


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
            (http,) = choose_ports(1)
            base_url = deploy_config(cluster, build_config(http, student, folder))
            with watch(cluster, folder / "prometheus") as prometheus:
                yield Stack(cluster, base_url, keys, prometheus, folder)
        finally:
            stop_cluster(cluster)


def build_config(port, student, folder):
    sizes = {"kv_cache_gib": 0.06, "max_num_seqs": 8, "max_num_batched_tokens": 512}
    engine = {"dtype": "float32", "enforce_eager": True, **sizes}
    small = {"kv_cache_gib": 0.01}  # 5,000 tokens: eight long answers do not fit
    pair = {
        "model": str(student),
        "prefill": {"engine": engine | {"cpu_cores": "0"}, "num_cpus": 0.5},
        "decode": {"engine": engine | small | {"cpu_cores": "1"}, "num_cpus": 0.5, "max_replicas": 2},
        "hop": {"min_tokens": 20, "timeout_s": 60, "retry_s": 1},
    }
    policy = {
        "policy_function": "swiftkv.serving.autoscaling:PoolPolicy",
        # Two devices: no replica is added, whose first counts no rate would show.
        "policy_kwargs": {"pair": pair, "settings": {"targets": TARGETS, "device_budget": 2}},
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


@pytest.fixture(scope="module")
def load(stack):
    """Eighty requests of five tenants; two more are refused. Before it a prompt comes twice, for caches."""
    rng = random.Random(3)
    warm = [build_request(stack, rng, index, 0.5 * index) for index in range(6)]
    again = Request(warm[1].body | {"prompt": random_prompt_ids(rng, 300)}, 4.0, "one", key=stack.keys["one"])
    # No rate shows a series' first count, and rates of one that was near zero a minute ago are drawn too low: as much
    # comes before, so that both gateways have seen each tenant.
    many = [build_request(stack, rng, index, 8 + 0.15 * index) for index in range(NUM_REQUESTS)]
    run_open(stack.base_url, [*warm, again, replace(again, arrival_s=6.0), *many])
    time.sleep(QUIET_S)
    before = read_counters(stack)
    first_look = look(find_endpoints(stack.discovery()))
    at = [index * DURATION_S / NUM_REQUESTS for index in range(NUM_REQUESTS)]
    requests = [build_request(stack, rng, index, arrival) for index, arrival in enumerate(at)]
    refused = [
        Request({"model": "tiny", "prompt": "a"}, 1.0, "refused", key=BAD_KEY),
        Request({"model": "absent", "prompt": "a"}, 2.0, "refused", key=stack.keys["one"]),
    ]
    since_s = time.time()
    answers = run_open(stack.base_url, [*requests, *refused])
    time.sleep(EXPORT_S)
    last_look = look(find_endpoints(stack.discovery()))
    time.sleep(QUIET_S - EXPORT_S)
    after, middle_s = read_counters(stack), since_s + 0.75 * DURATION_S
    return Load(answers, before, after, (first_look, last_look), middle_s, since_s, time.time())


def build_request(stack, rng, index, arrival_s):
    tenant = TENANTS[index % 7 % len(TENANTS)]
    prompt = random_prompt_ids(rng, rng.randint(5, 400))
    body = {"model": "tiny", "prompt": prompt, "max_tokens": rng.randint(2, 12), "temperature": 0, "ignore_eos": True}
    return Request(body | {"stream": index % 4 != 0}, arrival_s, tenant, key=stack.keys[tenant])


def read_counters(stack):
    prometheus = stack.prometheus
    tokens = {
        (tenant, kind): prometheus.total("ray_swiftkv_gateway_tokens_total", tenant=tenant, kind=kind)
        for tenant in stack.keys
        for kind in ("prompt", "cached", "completion")
    }
    charges = {
        tenant: prometheus.total("ray_swiftkv_gateway_charges_total", tenant=tenant, currency="USD")
        for tenant in stack.keys
    }
    answered = {
        tenant: prometheus.total("ray_swiftkv_gateway_requests_total", tenant=tenant, status="200")
        for tenant in stack.keys
    }
    engines = {
        pool: sum(
            prometheus.query(
                f'sum({name} * on (WorkerId) group_left (pool) swiftkv:replica:info{{pool="{pool}"}})'
            ).values()
        )
        for pool, name in (("decode", "ray_vllm_generation_tokens_total"), ("prefill", "ray_vllm_prompt_tokens_total"))
    }
    hops = {way: prometheus.total("ray_swiftkv_hop_prompts_total", way=way) for way in ("remote", "local")}
    return {"tokens": tokens, "charges": charges, "answered": answered, "engines": engines, "hops": hops}


def count_grown(load, name, key):
    return load.after[name][key] - load.before[name][key]


def list_complete(load, tenant=None):
    complete = [answer for answer in load.answers if answer.outcome == "complete"]
    return [answer for answer in complete if tenant in (None, answer.request.label)]


def test_the_load_was_answered(load):
    assert len(list_complete(load)) == NUM_REQUESTS, {a.reason for a in load.answers if a.outcome != "complete"}


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
    assert load.before["tokens"]["one", "cached"] > 0
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
    records = read_usage(Storage(stack.folder / "usage"), now - timedelta(hours=2), now + timedelta(hours=1))
    rows = {(row["tenant"], row["status"]): row for row in sum_usage(records, ["tenant", "status"])}
    assert rows["one", 404]["requests"] == 1
    for tenant in stack.keys:
        row = rows[tenant, 200]
        assert row["requests"] == load.after["answered"][tenant]
        for kind in ("prompt", "completion"):
            assert row[f"{kind}_tokens"] == load.after["tokens"][tenant, kind]
        tokens = {"prompt": row["prompt_tokens"] - row["cached_tokens"], "cached": row["cached_tokens"]}
        tokens["completion"] = row["completion_tokens"]
        charge = sum(tokens[kind] * Decimal(str(PRICES[kind])) for kind in tokens) / 1_000_000
        assert row["charges"] == {"USD": charge}
        assert load.after["charges"][tenant] == pytest.approx(float(charge), rel=1e-6)


def test_seconds_of_engines_are_their_lives_with_five_tenants_and_preemption(stack, load):
    """Each ledger, between two of its writings, against the clock; and what is exported of all of them."""
    before = read_ledgers(stack)
    requests = [build_request(stack, random.Random(index), index, 0.2 * index) for index in range(50)]
    long = [replace(request, body=request.body | {"max_tokens": 900}) for request in requests[:16]]
    answers = run_open(stack.base_url, [*requests, *long])
    assert all(answer.outcome == "complete" for answer in answers)
    time.sleep(2)
    after = read_ledgers(stack)
    assert len(before) >= 2 and before.keys() <= after.keys()
    for path, (began_s, earlier) in before.items():
        ended_s, later = after[path]
        told = sum(seconds for *_, seconds in later["seconds"]) - sum(seconds for *_, seconds in earlier["seconds"])
        print(f"\n{told:.2f} s in accounts, {ended_s - began_s:.2f} s passed")
        assert told == pytest.approx(ended_s - began_s, rel=0.02)
    time.sleep(EXPORT_S)
    assert stack.prometheus.total("ray_vllm_num_preemptions_total") > 0, "the load was to need more KV than there is"
    exported = stack.prometheus.query("sum by (tenant, phase) (ray_swiftkv_replica_seconds_total)")
    seconds = {tuple(value for _, value in sorted(labels)): value for labels, value in exported.items()}
    assert {tenant for _, tenant in seconds} == {*stack.keys, "-"}
    assert {phase for phase, _ in seconds} >= {"prefill", "decode", "idle"}
    for tenant in stack.keys:
        assert seconds["decode", tenant] > 0 and seconds["prefill", tenant] > 0
        unmodified = stack.prometheus.total("ray_swiftkv_unmodified_replica_seconds_total", tenant=tenant)
        busy = sum(value for (_, of), value in seconds.items() if of == tenant)
        assert busy < unmodified < 2 * busy, "prompts skip work, answers do not"
    for (phase, tenant), value in seconds.items():
        if tenant != "-":
            in_ledgers = sum(
                s for _, rows in after.values() for t, p, s in rows["seconds"] if (t, p) == (tenant, phase)
            )
            assert value == pytest.approx(in_ledgers, rel=1e-6), (tenant, phase)


def read_ledgers(stack):
    """When each was written, and what it holds, by its path."""
    found = {}
    for path in stack.cluster.folder.rglob("swiftkv-ledger-*/ledger.json"):
        if time.time() - path.stat().st_mtime < 3:  # of an engine that runs
            found[path] = (path.stat().st_mtime, json.loads(path.read_text()))
    return found


SEEN_BY_CLIENTS = {
    "ttft": lambda answer: answer.ttft_s if answer.request.body["stream"] else math.nan,
    "tpot": lambda answer: answer.tpot_s if answer.request.body["stream"] else math.nan,
    "request": lambda answer: answer.finished_s - answer.sent_s,
}


@pytest.mark.parametrize("fraction", [0.5, 0.95])
@pytest.mark.parametrize("name", SEEN_BY_CLIENTS)
def test_times_are_within_a_bucket_of_what_clients_saw(stack, load, name, fraction):
    metric = METRICS[f"swiftkv_gateway_{name}_seconds"]
    window = f"{load.until_s - load.since_s:.0f}s"
    (told,) = stack.prometheus.query(
        f"histogram_quantile({fraction}, sum by (le) (increase({metric.exported_name}_bucket[{window}])))",
        at_s=load.until_s,
    ).values()
    seen = find_percentile([SEEN_BY_CLIENTS[name](answer) for answer in list_complete(load)], 100 * fraction)
    edges = [0.0, *metric.boundaries, math.inf]
    place = next(index for index, edge in enumerate(edges) if seen <= edge)
    print(f"\n{name} p{100 * fraction:g}: {told:.4f} s told, {seen:.4f} s seen")
    assert edges[max(0, place - 2)] <= told <= edges[min(place + 1, len(edges) - 1)]


def find_query(uid, title, number=0):
    (panel,) = (panel for board in BOARDS if board.uid == uid for panel in board.panels if panel.title == title)
    return panel.queries[number].expr


def measure_area(stack, load, label, *place):
    """What a panel's curves say was counted, by one of their labels."""
    areas = Counter()
    for labels, area in stack.prometheus.measure_area(find_query(*place), load.since_s, load.until_s).items():
        areas[dict(labels).get(label, "")] += area
    return areas


def test_rates_on_boards_add_up_to_what_was_sent(stack, load):
    """Within 2%, each: the area under a rate's curve is what was counted."""
    answers = list_complete(load)
    prompts = [len(answer.request.body["prompt"]) for answer in answers]
    remote = [tokens for tokens in prompts if tokens >= 20]
    completion = sum(answer.request.body["max_tokens"] for answer in answers)
    expected = {
        ("pool", "swiftkv-throughput", "Completion tokens/s by pool"): {"decode": completion},
        ("pool", "swiftkv-throughput", "Prompt tokens/s by pool"): {"prefill": sum(remote), "decode": sum(prompts)},
        ("kind", "swiftkv-throughput", "Tokens/s by model and version"): {
            "prompt": sum(prompts),
            "completion": completion,
        },
        ("tenant", "swiftkv-throughput", "Tokens/s by tenant"): {
            tenant: sum(
                len(a.request.body["prompt"]) + a.request.body["max_tokens"] for a in list_complete(load, tenant)
            )
            for tenant in TENANTS
        },
        ("model", "swiftkv-throughput", "Goodput and all answers"): {"tiny": len(answers)},
        ("model", "swiftkv-throughput", "Goodput and all answers", 1): {"tiny": len(answers)},
        ("status", "swiftkv-throughput", "Requests/s by status"): {"200": len(answers)},
        ("tenant", "swiftkv-tenants", "Requests/s"): {
            tenant: len(list_complete(load, tenant)) for tenant in TENANTS[1:]
        },
        ("way", "swiftkv-transfer", "Prompts/s by where they are prefilled"): {
            "remote": len(remote),
            "local": len(prompts) - len(remote),
        },
    }
    wrong = []
    for place, counts in expected.items():
        areas = measure_area(stack, load, *place)
        for value, count in counts.items():
            print(f"\n{place[2]}, {value}: {areas[value]:.1f} drawn, {count} sent")
            if areas[value] != pytest.approx(count, rel=0.02):
                wrong.append((*place[1:], value, areas[value], count))
    assert not wrong


def test_flops_and_bytes_on_boards_are_the_spec_s(stack, load):
    """Of the prefill pool, whose one engine computes each prompt once: with every layer, as the unmodified model does,
    and without the later ones."""
    spec = SwiftKVSpec.from_hf_config(json.loads((stack.folder / "tiny" / "config.json").read_text()))
    prompts = [tokens for answer in list_complete(load) if (tokens := len(answer.request.body["prompt"])) >= 20]
    executed = sum(tokens * spec.compute_prompt_token_flops(tokens).total for tokens in prompts)
    unmodified = sum(tokens * spec.teacher.compute_prompt_token_flops(tokens).total for tokens in prompts)
    unmodified += len(prompts) * spec.compute_lm_head_flops()
    for title, flops in (("Executed", executed), ("Normalised", unmodified)):
        drawn = measure_area(stack, load, "pool", "swiftkv-throughput", f"{title} FLOP/s of a device")["prefill"]
        print(f"\n{title}: {drawn:.4g} drawn, {flops:.4g} by the spec")
        assert drawn == pytest.approx(flops, rel=0.02)
    (moved,) = measure_area(stack, load, "", "swiftkv-transfer", "Bytes/s").values()
    blocks_bytes = sum(math.ceil(tokens / 128) * 128 for tokens in prompts) * spec.compute_kv_bytes_per_token(4)
    print(f"\nKV: {moved:.4g} bytes drawn, {blocks_bytes:.4g} moved")
    assert moved == pytest.approx(blocks_bytes, rel=0.02)


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
    found = stack.prometheus.query(fill_in(expr, 300), at_s=load.middle_s)
    if reason := QUIET.get(title) or QUIET.get(uid):
        assert len(found) <= 1 and not any(found.values()), f"said to be quiet ({reason}); take it out of QUIET"
    elif title in ("wanted replicas change", "Why"):
        pass  # they have marks and reasons when there are some
    else:
        assert found, f"no series: {expr}"


def test_every_metric_of_the_table_and_of_others_is_there_with_its_labels(stack, load):
    absent = {"distill", "rollout", "registry"}
    names = stack.prometheus.list_names()
    quiet = {"swiftkv_hop_failures_total", "swiftkv_usage_lost_tokens_total"}
    for metric in METRICS.values():
        if metric.name.split("_")[1] in absent or metric.name in quiet:
            continue
        for name in metric.exported_names:
            assert name in names, name
            assert set(metric.labels) <= list_labels(stack, name), name
    quiet = {"preemptions", "failed_transfers", "kv_expired"}
    for metric in FOREIGN.values():
        if not any(word in metric.exported_name for word in quiet):
            for name in metric.exported_names:
                assert name in names, f"{name} (seen in {metric.seen_in})"
                assert set(metric.labels) <= list_labels(stack, name), name


def list_labels(stack, name):
    return {label for series in stack.prometheus.list_series(name) for label in series}


def test_no_process_has_more_series_than_the_table_allows(stack, load):
    """And what an engine's process exports beside its tenants' is as much as the README counts with."""
    for metric in METRICS.values():
        names = "|".join(metric.exported_names)
        by_process = Counter(series["WorkerId"] for series in stack.prometheus.list_series(f'{{__name__=~"{names}"}}'))
        assert max(by_process.values(), default=0) <= metric.count_series(tenant=len(TENANTS) + 1), metric.name
    engines = {dict(labels)["WorkerId"] for labels in stack.prometheus.query("swiftkv:replica:info")}
    for worker in engines:
        series = stack.prometheus.list_series(f'{{WorkerId="{worker}", __name__=~"ray_.*"}}')
        others = [one for one in series if "tenant" not in one]
        print(f"\n{len(others)} series of a replica's process without a tenant")
        assert len(others) < 1500


def test_pods_of_a_kuberay_cluster_are_found_by_their_labels(stack, load, tmp_path):
    """The shipped configuration for Kubernetes, given what its discovery would tell: Debian's Prometheus has none."""
    config = yaml.safe_load((SHIPPED / "kubernetes.yml").read_text())
    (job,) = config["scrape_configs"]
    assert [found["role"] for found in job.pop("kubernetes_sd_configs")] == ["pod"]
    ray = {
        "__meta_kubernetes_namespace": "serving",
        "__meta_kubernetes_pod_label_ray_io_node_type": "worker",
        "__meta_kubernetes_pod_label_ray_io_cluster": "pools",
        "__meta_kubernetes_pod_name": "pools-worker-1",
    }
    metrics_port = {"__meta_kubernetes_pod_container_port_name": "metrics"}
    (target,) = {address for address in find_endpoints(stack.discovery()) if answers_with(address, "ray_vllm_")}
    pods = [
        {"targets": [target], "labels": ray | metrics_port},
        {"targets": ["127.0.0.1:1"], "labels": ray | {"__meta_kubernetes_pod_container_port_name": "gcs"}},
        {"targets": ["127.0.0.1:2"], "labels": {"__meta_kubernetes_namespace": "serving"} | metrics_port},
    ]
    (tmp_path / "pods.json").write_text(json.dumps(pods))
    job["file_sd_configs"] = [{"files": [str(tmp_path / "pods.json")]}]
    with run_prometheus(tmp_path / "prometheus", config) as prometheus:
        deadline = time.monotonic() + 60
        while not prometheus.total("ray_swiftkv_gateway_requests_total"):
            assert time.monotonic() < deadline, prometheus.list_targets()
            time.sleep(1)
        (only,) = prometheus.list_targets()
    assert only["labels"]["namespace"] == "serving" and only["labels"]["ray_io_cluster"] == "pools"
    assert only["labels"]["pod"] == "pools-worker-1" and only["scrapeUrl"] == f"http://{target}/metrics"


def answers_with(address, start):
    return any(name.startswith(start) for name in look([address]).samples)


def test_no_alert_fires_for_a_stack_that_is_well(stack, load):
    assert stack.prometheus.query('ALERTS{alertstate="firing"}') == {}


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
def test_boards_can_be_drawn(stack, load, board, tmp_path):
    """The pictures are those of the reports where SWIFTKV_PICTURES names a folder."""
    figure = draw_board(board, stack.prometheus.url, minutes=4, until_s=load.until_s)
    drawn = [axis for axis in figure.axes if axis.lines or axis.images]
    quiet = [panel for panel in board.panels if panel.title in QUIET]
    assert board.uid == "swiftkv-distillation" or len(drawn) >= len(board.panels) - max(3, len(quiet))
    figure.savefig(Path(os.environ.get("SWIFTKV_PICTURES", tmp_path)) / f"{board.uid}.png", dpi=110)


def test_top_shows_the_load_without_a_prometheus_server(load):
    console = Console(width=160, record=True)
    console.print(render(*load.looks))
    text = console.export_text()
    assert re.search(r"tiny .* ms", text) and re.search(r"pair +│ +prefill", text), text
    assert re.search(r"pair +│ +decode", text) and re.search(r"two +│ +[1-9]", text), text
