"""The running stack of two pools in its secure profile (keys, TLS, token) against the tables of SECURITY.md.

One cluster serves every test, deployed with the function of `swiftkv serve CONFIG`.
"""

import hashlib
import itertools
import re
import socket
import ssl
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import openai
import psutil
import pytest
import yaml
from certificates import write_certificate
from fakes import TinyShape, write_student

from swiftkv.cluster import choose_ports, find_processes, read_tls, start_cluster, stop_cluster
from swiftkv.errors import ConfigError
from swiftkv.serving.deploy import deploy_config

pytestmark = [pytest.mark.cluster, pytest.mark.engine]

KEY = "swk_" + "k" * 40
WRONG_KEY = "swk_" + "w" * 40
PASSWORD = "a-secret-of-the-object-store-" + "s" * 12
PROMPT = "a text that nobody but its writer should read"
PAGE = Path(__file__).parents[2] / "SECURITY.md"
ANY_PORT = range(1, 65536)


@dataclass(frozen=True)
class Row:
    """Of the table of listeners."""

    what: str
    known_by: str
    here: str
    elsewhere: str
    asks_for: str


@dataclass(frozen=True)
class Listener:
    """A socket that the stack listens on."""

    process: str
    host: str
    port: int
    is_tcp: bool = True

    @property
    def is_on_loopback(self):
        return self.host.removeprefix("::ffff:").startswith("127.")


class Stack:
    """What runs."""

    def __init__(self, cluster, url, port, certificate, folder):
        self.cluster = cluster
        self.url = url
        self.port = port
        self.certificate = certificate
        self.folder = folder
        self.known_ports = {port: "http_options.port"} | self._read_ports_of_the_head()
        self.client = httpx.Client(verify=ssl.create_default_context(cafile=certificate), timeout=120)

    def _read_ports_of_the_head(self):
        """What its command line and environment say that ports are for."""
        head = psutil.Process(self.cluster.pid)
        options = {int(value): word for word, value in itertools.pairwise(head.cmdline()) if word.endswith("port")}
        names = [name for name in head.environ() if re.fullmatch(r"DASHBOARD_METRIC_PORT|RAY_SERVE_\w+_PORT", name)]
        return options | {int(head.environ()[name]): name for name in names}

    def complete(self, key=KEY, prompt=PROMPT):
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0}
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return self.client.post(f"{self.url}/completions", json=body, headers=headers)

    def find_listeners(self):
        found = []
        for process in find_processes(self.cluster):
            try:
                name, sockets = " ".join(process.cmdline()), process.net_connections(kind="inet")
            except psutil.NoSuchProcess:
                continue
            for each in sockets:
                is_tcp = each.type == socket.SOCK_STREAM
                if each.status == psutil.CONN_LISTEN or not (is_tcp or each.raddr):
                    found.append(Listener(name, each.laddr.ip, each.laddr.port, is_tcp))
        return sorted(set(found), key=lambda one: one.port)


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secure")
    student = write_student(folder / "tiny", TinyShape(max_position_embeddings=2304), 2, 2)
    certificate, key = write_certificate(folder / "certificate")
    tenants = {"tenants": [{"name": "somebody", "key_sha256": [hashlib.sha256(KEY.encode()).hexdigest()]}]}
    (folder / "tenants.yaml").write_text(yaml.safe_dump(tenants))
    (port,) = choose_ports(1)
    options = {"host": "127.0.0.1", "port": port, "ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWIFTKV_HOME", str(folder / "home"))
        patch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
        patch.setenv("HF_TOKEN", PASSWORD)
        cluster = start_cluster(tls=read_tls(options, "the test"))
        try:
            url = deploy_config(cluster, build_config(options, student, folder))
            running = Stack(cluster, url, port, certificate, folder)
            assert running.complete().status_code == 200  # the pools have met
            yield running
        finally:
            stop_cluster(cluster)


def build_config(http_options, student, folder):
    engine = {"dtype": "float32", "enforce_eager": True, "kv_cache_gib": 0.06, "max_num_seqs": 8}
    pair = {
        "model": str(student),
        "prefill": {"engine": engine | {"cpu_cores": "0"}, "num_cpus": 0.5},
        "decode": {"engine": engine | {"cpu_cores": "1"}, "num_cpus": 0.5},
        "hop": {"min_tokens": 20, "timeout_s": 60},
    }
    gateway = {
        "models": {"tiny": {"routes": [{"application": "pair"}], "capacity": {"max_in_flight_sequences": 16}}},
        "tenants_file": str(folder / "tenants.yaml"),
        "usage_store": str(folder / "usage"),
    }
    paths = {
        "pair": "swiftkv.serving.app:build_pair_version",
        "gateway": "swiftkv.serving.gateway.app:build_gateway_app",
    }
    applications = [
        {"name": name, "route_prefix": route, "import_path": paths[name], "args": args}
        for name, route, args in (("pair", None, pair), ("gateway", "/", gateway))
    ]
    return {"proxy_location": "HeadOnly", "http_options": http_options, "applications": applications}


def read_table(heading):
    """The rows below a heading of SECURITY.md, without the table's own head."""
    section = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


ROWS = {cells[1].strip("`"): Row(*cells) for cells in read_table("What listens")}


def find_row(stack, listener):
    """The row of the table that the socket is of, or None."""
    if not listener.is_tcp:
        return ROWS.get(f"{Path(listener.process.split()[0]).name} UDP")
    if known_by := stack.known_ports.get(listener.port):
        return ROWS.get(known_by)
    if listener.process.startswith("ray::ServeReplica"):
        if not listener.is_on_loopback:
            return ROWS.get("ray::ServeReplica every")
        if listener.port in range(30000, 31000):
            return ROWS.get("ray::ServeReplica 30000-30999")
    name = listener.process.split()[0]
    return ROWS.get("ray") if name.startswith(("ray::", "ray-dashboard")) else ROWS.get(name)


# The scan.


def test_every_listening_socket_is_in_the_table_and_every_row_is_there(stack):
    listeners = stack.find_listeners()
    unknown = [listener for listener in listeners if find_row(stack, listener) is None]
    assert not unknown
    found = {find_row(stack, listener) for listener in listeners}
    assert found == set(ROWS.values())
    for listener in listeners:
        row = find_row(stack, listener)
        assert row.here.startswith("loopback" if listener.is_on_loopback else "every address"), listener
        if row.asks_for == "nothing" and listener.is_tcp:
            assert listener.is_on_loopback, listener


def test_a_scan_from_outside_reaches_only_what_asks_for_the_token(stack):
    """Every port of each address that this machine has beside loopback."""
    owners = {listener.port: listener for listener in stack.find_listeners() if listener.is_tcp}
    cards = [each for addresses in psutil.net_if_addrs().values() for each in addresses]
    outside = [each.address for each in cards if each.family == socket.AF_INET and not each.address.startswith("127.")]
    reached = {port for address in outside for port in scan(address, ANY_PORT)} & set(owners)
    assert reached == {port for port, listener in owners.items() if not listener.is_on_loopback} or not outside
    assert {find_row(stack, owners[port]).asks_for for port in reached} <= {"token"}


def test_a_scan_of_loopback_finds_what_processes_say_that_they_listen_on(stack):
    told = {listener.port for listener in stack.find_listeners() if listener.is_tcp}
    assert told <= set(scan("127.0.0.1", ANY_PORT))


def scan(address, ports):
    """Those ports at which something accepts a connection."""
    found = []
    for port in ports:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex((address, port)) == 0:
                found.append(port)
    return found


# What refuses.

GRPC = {
    "--port": "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "--node-manager-port": "/ray.rpc.NodeManagerService/GetSystemConfig",
    "--object-manager-port": "/ray.rpc.ObjectManagerService/Pull",
    "--dashboard-agent-grpc-port": "/ray.rpc.ReporterService/GetTraceback",
    "--ray-client-server-port": "/ray.rpc.RayletDriver/ClusterInfo",
    "ray::ServeReplica every": "/ray.serve.ASGIService/HandleRequest",
    "ray": "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
}
"""A call that each would answer, by the row."""
HTTP = {"--dashboard-port": "/api/jobs/", "--dashboard-agent-listen-port": "/", "--runtime-env-agent-port": "/"}


def test_what_asks_for_the_token_refuses_without_it_and_answers_with_it(stack):
    token = stack.cluster.headers()["Authorization"]
    asked = set()
    for listener in stack.find_listeners():
        row = find_row(stack, listener)
        if row.asks_for != "token":
            continue
        asked.add(row)
        for header in (None, "Bearer " + "0" * 64):
            assert ask(listener, row, header) in (401, 403, grpc.StatusCode.UNAUTHENTICATED), (row, header)
        assert ask(listener, row, token) not in (401, 403, grpc.StatusCode.UNAUTHENTICATED), row
    assert asked == {row for row in ROWS.values() if row.asks_for == "token"}


def ask(listener, row, header):
    """The status of a call with this Authorization header, of gRPC or of HTTP."""
    if path := HTTP.get(row.known_by.strip("`")):
        headers = {"Authorization": header} if header else {}
        return httpx.get(f"http://127.0.0.1:{listener.port}{path}", headers=headers, timeout=20).status_code
    method = GRPC[row.known_by.strip("`")]
    with grpc.insecure_channel(f"127.0.0.1:{listener.port}") as channel:
        call = channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)
        try:
            call(b"", timeout=20, metadata=(("authorization", header),) if header else ())
        except grpc.RpcError as error:
            assert error.code() != grpc.StatusCode.UNIMPLEMENTED, f"{method} is no call of {listener}"
            return error.code()
    return grpc.StatusCode.OK


def test_what_asks_for_a_key_refuses_without_it(stack):
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1}
    for listener in stack.find_listeners():
        if find_row(stack, listener).asks_for != "API key":
            continue
        scheme = "https" if listener.port == stack.port else "http"
        for headers in ({}, {"Authorization": f"Bearer {WRONG_KEY}"}):
            answer = stack.client.post(
                f"{scheme}://127.0.0.1:{listener.port}/v1/completions", json=body, headers=headers
            )
            # A version's own HTTP server has nothing to answer with.
            assert answer.status_code == 401 or ("Decode" in listener.process and answer.status_code == 500), listener
    assert stack.complete().status_code == 200


# TLS.


def test_the_endpoint_speaks_tls_only_and_shows_its_certificate(stack):
    assert stack.url.startswith("https://")
    with pytest.raises(httpx.ConnectError, match="self-signed|CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{stack.url}/models", timeout=20)  # nobody vouches for it here
    with pytest.raises(httpx.HTTPError):
        httpx.get(stack.url.replace("https", "http") + "/models", timeout=20)
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", stack.port), timeout=20) as connection:
        old.wrap_socket(connection)


def test_streams_come_through_tls(stack):
    client = openai.OpenAI(base_url=stack.url, api_key=KEY, http_client=stack.client, max_retries=0)
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=5, stream=True, extra_body={"ignore_eos": True}
    )
    assert sum(1 for event in stream if event.choices) >= 5


def test_a_config_without_the_certificate_is_refused_on_this_cluster(stack):
    config = build_config({"host": "127.0.0.1", "port": stack.port}, "nothing", stack.folder)
    with pytest.raises(ConfigError, match=r"was started with the certificate .*certificate.pem. Stop it"):
        deploy_config(stack.cluster, config)


# Secrets.


def test_secrets_and_texts_are_nowhere_to_be_read(stack):
    """In logs, metrics, what the dashboard tells, command lines and usage records."""
    assert stack.complete().status_code == 200
    assert stack.complete(key=WRONG_KEY).status_code == 401
    assert stack.complete(prompt=[10**9]).status_code == 400  # an error that quotes what it refuses
    token = stack.cluster.token_path.read_text(encoding="utf-8")
    secrets = {"key": KEY, "wrong key": WRONG_KEY, "token": token, "password": PASSWORD, "text": PROMPT}
    time.sleep(6)  # usage records are written every five seconds
    texts = {str(path): path.read_bytes() for path in find_files(stack)}
    assert any("usage" in name for name in texts) and sum(map(len, texts.values())) > 10_000
    texts |= {f"command line of {each.pid}": " ".join(each.cmdline()).encode() for each in find_living(stack)}
    for name in ("--metrics-export-port", "DASHBOARD_METRIC_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT"):
        (port,) = [port for port, known_by in stack.known_ports.items() if known_by == name]
        texts[name] = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=20).content
    for path in ("/api/serve/applications/", "/api/jobs/", "/api/v0/actors?detail=true", "/api/v0/workers?detail=true"):
        answer = httpx.get(stack.cluster.dashboard_url + path, headers=stack.cluster.headers(), timeout=60)
        assert answer.status_code == 200
        texts[path] = answer.content
    said = [
        (what, place) for what, secret in secrets.items() for place, text in texts.items() if secret.encode() in text
    ]
    assert not said


def find_files(stack):
    """All that the stack has written, but for the token itself."""
    for folder in (stack.cluster.folder, stack.folder / "home", stack.folder / "usage"):
        for path in folder.rglob("*"):
            if path.is_file() and path != stack.cluster.token_path and path.suffix != ".safetensors":
                yield path


def find_living(stack):
    return [each for each in find_processes(stack.cluster) if each.is_running()]


# The page.


def test_every_claim_names_a_test_that_is_there():
    for claim, shown_by in read_table("Claims"):
        paths = re.findall(r"`(tests/[^`]+)`", shown_by)
        assert paths or "make" in shown_by, claim
        for path in paths:
            assert (PAGE.parent / path).is_file(), path
