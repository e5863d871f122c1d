"""One trace per request through a gateway and two real pools, as a collector receives it.

The collector is in this process. The replicas hold their spans back for longer than the test takes, so that what it has
was sent when they ended.
"""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from fakes import TinyShape, write_student
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from swiftkv.cluster import choose_ports, start_cluster, stop_cluster
from swiftkv.serving.deploy import deploy_config, undeploy

pytestmark = [pytest.mark.cluster, pytest.mark.engine]

SECRET = "tell-nobody "
CASES = [(way, stream) for way in ("remote", "local") for stream in (True, False)]
LENGTHS = {"remote": 30, "local": 1}
"""Of prompts, in words of SECRET: the longer ones are handed over."""
CLIENT = bytes.fromhex("b7ad6b7169203331")
ENDED_S = 60.0


class Collector(ThreadingHTTPServer):
    """An OTLP endpoint over HTTP that keeps what it is sent."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Receive)
        self.bodies = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def list_spans(self):
        """With the attributes of the process that each is of."""
        for body in list(self.bodies):
            for of_process in ExportTraceServiceRequest.FromString(body).resource_spans:
                resource = read_attributes(of_process.resource)
                for scope in of_process.scope_spans:
                    yield from ((span, resource) for span in scope.spans)


class Receive(BaseHTTPRequestHandler):
    """One export."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/traces":
            self.server.bodies.append(body)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def read_attributes(of):
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in of.attributes}


def build_trace_id(case):
    return bytes([CASES.index(case) + 1] * 16)


@pytest.fixture(scope="module")
def collector(tmp_path_factory):
    """It, after the stack has answered one request of each case and has ended."""
    folder = tmp_path_factory.mktemp("tracing")
    student = write_student(folder / "tiny", TinyShape(max_position_embeddings=2304), 2, 2)
    collector = Collector()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWIFTKV_HOME", str(folder / "home"))
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        patch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        patch.setenv("OTEL_SERVICE_NAME", "traced")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
        cluster = start_cluster()
        try:
            (port,) = choose_ports(1)
            base_url = deploy_config(cluster, build_config(port, student))
            for case in CASES:
                ask(base_url, case)
            sent_before = list(collector.bodies)
            undeploy(cluster)
            wait_for_engines(collector)
        finally:
            stop_cluster(cluster)
    assert not sent_before
    yield collector
    collector.shutdown()


def build_config(port, student):
    sizes = {"kv_cache_gib": 0.06, "max_num_seqs": 8, "max_num_batched_tokens": 512}
    engine = {"dtype": "float32", "enforce_eager": True, **sizes}
    pair = {
        "model": str(student),
        "prefill": {"engine": engine | {"cpu_cores": "0"}, "num_cpus": 0.5},
        "decode": {"engine": engine | {"cpu_cores": "1"}, "num_cpus": 0.5},
        "hop": {"min_tokens": 20, "timeout_s": 60},
        "kv_lease_s": 3,  # the prefill replica ends after it
    }
    gateway = {
        "models": {"tiny": {"routes": [{"application": "pair"}], "capacity": {"max_in_flight_sequences": 16}}},
        "limits": {"ttft_target_s": None},
    }
    applications = [
        {"name": "pair", "route_prefix": None, "import_path": "swiftkv.serving.app:build_pair_version", "args": pair},
        {
            "name": "gateway",
            "route_prefix": "/",
            "import_path": "swiftkv.serving.gateway.app:build_gateway_app",
            "args": gateway,
        },
    ]
    http_options = {"host": "127.0.0.1", "port": port}
    return {"proxy_location": "HeadOnly", "http_options": http_options, "applications": applications}


def ask(base_url, case):
    way, stream = case
    prompt = f"{CASES.index(case)}: {SECRET * LENGTHS[way]}"
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True, "stream": stream}
    headers = {"traceparent": f"00-{build_trace_id(case).hex()}-{CLIENT.hex()}-01", "x-request-id": f"{way}-{stream}"}
    answer = httpx.post(f"{base_url}/completions", json=body, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text


def wait_for_engines(collector):
    """Until the replicas that end have sent their spans, those of the prefill engine last."""
    wanted = {"gateway": 4, "decode": 4, "prefill": 2, "llm_request": 6}
    deadline = time.monotonic() + ENDED_S
    while time.monotonic() < deadline:
        names = [span.name for span, _ in collector.list_spans()]
        if all(names.count(name) >= count for name, count in wanted.items()):
            return
        time.sleep(0.2)
    raise AssertionError(f"replicas have ended without their spans; there are {sorted(names)}")


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{'stream' if case[1] else 'whole'}")
def case(request):
    return request.param


@pytest.fixture
def spans(collector, case):
    """Those of one trace by name and parent's name, each with its attributes and its process's."""
    of_trace = [(span, of) for span, of in collector.list_spans() if span.trace_id == build_trace_id(case)]
    names = {span.span_id: span.name for span, _ in of_trace} | {CLIENT: "client"}
    found = {(names.get(span.parent_span_id), span.name): (span, read_attributes(span), of) for span, of in of_trace}
    assert len(found) == len(of_trace)
    return found


def test_the_whole_way_is_one_trace(spans, case):
    way, _ = case
    everywhere = {("client", "gateway"), ("gateway", "queue"), ("gateway", "decode"), ("decode", "llm_request")}
    hop = {("decode", "hop"), ("hop", "prefill"), ("prefill", "llm_request"), ("llm_request", "kv_transfer")}
    assert set(spans) == (everywhere | hop if way == "remote" else everywhere)


def test_steps_say_what_they_were(spans, case):
    way, stream = case
    _, gateway, _ = spans["client", "gateway"]
    assert gateway["swiftkv.request_id"] == f"{way}-{stream}"
    assert (gateway["swiftkv.tenant"], gateway["swiftkv.model"]) == ("anonymous", "tiny")
    assert (gateway["swiftkv.application"], gateway["swiftkv.status"]) == ("pair", 200)
    assert gateway["swiftkv.completion_tokens"] == 4
    assert spans["gateway", "decode"][1]["swiftkv.way"] == way
    if way == "remote":
        assert spans["decode", "hop"][1]["swiftkv.taken"] is True
        assert spans["hop", "prefill"][1]["swiftkv.prompt_tokens"] == gateway["swiftkv.prompt_tokens"]


def test_steps_are_of_the_processes_that_took_them(spans, case):
    of = {key: resource["swiftkv.deployment"].partition(":")[0] for key, (_, _, resource) in spans.items()}
    assert of["client", "gateway"] == of["gateway", "queue"] == "gateway"
    assert of["gateway", "decode"] == of["decode", "llm_request"] == "Decode"
    if case[0] == "remote":
        assert of["decode", "hop"] == of["llm_request", "kv_transfer"] == "Decode"
        assert of["hop", "prefill"] == of["prefill", "llm_request"] == "Prefill"
    assert {resource["service.name"] for _, _, resource in spans.values()} == {"traced"}


def test_steps_begin_in_order_and_end_within_the_request(spans, case):
    """By one machine's clock; vLLM tells its seconds to the nearest step."""
    (whole, *_), (decode, *_) = spans["client", "gateway"], spans["gateway", "decode"]
    assert whole.start_time_unix_nano <= decode.start_time_unix_nano <= decode.end_time_unix_nano
    assert all(span.start_time_unix_nano >= whole.start_time_unix_nano for span, *_ in spans.values())
    if case[0] == "remote":
        hop, transfer = spans["decode", "hop"][0], spans["llm_request", "kv_transfer"][0]
        slack_ns = 50_000_000
        assert transfer.start_time_unix_nano >= hop.end_time_unix_nano - slack_ns
        assert transfer.start_time_unix_nano < transfer.end_time_unix_nano <= decode.end_time_unix_nano + slack_ns


def test_no_span_has_text(collector):
    assert collector.bodies and not any(SECRET.strip().encode() in body for body in collector.bodies)
