"""What happened between two looks at Ray's endpoints, and what `swiftkv top` makes of it."""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from rich.console import Console
from typer.testing import CliRunner

from swiftkv.cli import top as module
from swiftkv.cli.main import app
from swiftkv.errors import ClusterError
from swiftkv.metrics.reading import Look, find_endpoints, find_quantile, look, rate_by

FIRST = """\
# TYPE ray_swiftkv_gateway_requests_total counter
ray_swiftkv_gateway_requests_total{WorkerId="g",model="m",tenant="a",status="200",version="v"} 10.0
ray_swiftkv_gateway_requests_total{WorkerId="g",model="m",tenant="b",status="200",version="v"} 5.0
# TYPE ray_swiftkv_gateway_ttft_seconds histogram
ray_swiftkv_gateway_ttft_seconds_bucket{WorkerId="g",model="m",tenant="a",version="v",le="0.1"} 4.0
ray_swiftkv_gateway_ttft_seconds_bucket{WorkerId="g",model="m",tenant="a",version="v",le="1.0"} 4.0
ray_swiftkv_gateway_ttft_seconds_bucket{WorkerId="g",model="m",tenant="a",version="v",le="+Inf"} 4.0
# TYPE ray_swiftkv_gateway_tokens_total counter
ray_swiftkv_gateway_tokens_total{WorkerId="g",model="m",tenant="a",kind="completion",version="v"} 100.0
ray_swiftkv_gateway_tokens_total{WorkerId="g",model="m",tenant="a",kind="prompt",version="v"} 1000.0
# TYPE ray_vllm_generation_tokens_total counter
ray_vllm_generation_tokens_total{WorkerId="d",ReplicaId="r"} 100.0
# TYPE ray_serve_deployment_replica_healthy gauge
ray_serve_deployment_replica_healthy{WorkerId="c",application="pair",deployment="Decode:m",replica="r"} 1.0
ray_serve_deployment_replica_healthy{WorkerId="c",application="gateway",deployment="gateway",replica="s"} 1.0
# TYPE ray_serve_deployment_replica_starts_total counter
ray_serve_deployment_replica_starts_total{WorkerId="d",application="pair",deployment="Decode:m",replica="r"} 1.0
"""
SECOND = (
    FIRST.replace('tenant="a",status="200",version="v"} 10.0', 'tenant="a",status="200",version="v"} 30.0')
    .replace('tenant="b",status="200",version="v"} 5.0', 'tenant="b",status="200",version="v"} 2.0')  # began again
    .replace('le="0.1"} 4.0', 'le="0.1"} 6.0')
    .replace('le="1.0"} 4.0', 'le="1.0"} 12.0')
    .replace('le="+Inf"} 4.0', 'le="+Inf"} 14.0')
    .replace('kind="completion",version="v"} 100.0', 'kind="completion",version="v"} 340.0')
    .replace('ReplicaId="r"} 100.0', 'ReplicaId="r"} 345.0')
)


@pytest.fixture
def discovery(tmp_path):
    """An endpoint whose text tests change, in a file as Ray writes it."""

    class Handler(BaseHTTPRequestHandler):
        text = FIRST

        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(type(self).text.encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    path = tmp_path / "prom_metrics_service_discovery.json"
    groups = [{"labels": {"job": "ray"}, "targets": [f"127.0.0.1:{server.server_port}", "127.0.0.1:1"]}]
    path.write_text(json.dumps(groups))
    yield path, Handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def looks(discovery):
    """Ten seconds apart; one of the two endpoints does not answer."""
    path, handler = discovery
    first = look(find_endpoints(path))
    handler.text = SECOND
    second = look(find_endpoints(path))
    return Look(0.0, first.samples), Look(10.0, second.samples)


def test_rates_are_by_label_and_outlive_a_restart(looks):
    name = "ray_swiftkv_gateway_requests_total"
    assert rate_by(*looks, name, "tenant") == {("a",): 2.0, ("b",): 0.2}
    assert rate_by(*looks, name, "model") == {("m",): 2.2}
    assert rate_by(*looks, name, tenant="a") == {(): 2.0}
    assert rate_by(*looks, "ray_nothing") == {}


@pytest.mark.parametrize(("fraction", "seconds"), [(0.2, 0.1), (0.5, 0.1 + 0.9 * 3 / 6), (0.8, 1.0), (0.95, 1.0)])
def test_quantiles_are_those_of_prometheus(looks, fraction, seconds):
    """Of ten new values two are up to 0.1 s, six more up to 1 s, and two beyond the last edge."""
    assert find_quantile(*looks, "ray_swiftkv_gateway_ttft_seconds", fraction) == pytest.approx(seconds)
    assert find_quantile(*looks, "ray_swiftkv_gateway_ttft_seconds", fraction, model="other") is None


def test_the_view_has_models_pools_and_tenants(looks):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(module.render(*looks))
    text = console.export_text()
    for words in (["m", "2.20", "550 ms", "1.00 s"], ["pair", "decode", "24"], ["a", "0", "24"]):
        assert any(all(word in line.split() or word in line for word in words) for line in text.splitlines()), words
    assert "gateway" not in text, "a gateway is no pool"


def test_without_a_gateway_there_are_pools_only_and_without_pools_nothing(looks):
    def show(kept):
        console = Console(width=140, record=True, file=io.StringIO())
        views = (Look(seen.at_s, {k: v for k, v in seen.samples.items() if kept in k}) for seen in looks)
        console.print(module.render(*views))
        return console.export_text()

    assert "pools" in show("") and "tenants" in show("")
    pools = show("ray_serve")
    assert "pools" in pools and "models" not in pools and "tenants" not in pools
    assert show("nothing").strip() == "nothing is served"


def test_top_once_prints_one_view(discovery, monkeypatch):
    monkeypatch.setattr(module, "INTERVAL_S", 0.01)
    result = CliRunner().invoke(app, ["top", "--once", "--discovery", str(discovery[0])])
    assert result.exit_code == 0 and "pools" in result.output


def test_nothing_to_look_at_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("SWIFTKV_HOME", str(tmp_path))
    with pytest.raises(ClusterError, match="swiftkv serve"):
        module.top(once=True)
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(ClusterError, match="it names none"):
        module.top(once=True, discovery=tmp_path / "empty.json")
    with pytest.raises(ClusterError, match="it names none"):
        module.top(once=True, discovery=tmp_path / "absent.json")
