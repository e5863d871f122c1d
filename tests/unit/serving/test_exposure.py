"""What asks nobody for a key does not run where others reach it, whoever deploys it."""

from types import SimpleNamespace

import pytest

from swiftkv.errors import ConfigError
from swiftkv.serving.app import build_app, build_pair_app
from swiftkv.serving.config import PairSettings, PoolSettings, ServeSettings
from swiftkv.serving.gateway.app import build_gateway_app
from swiftkv.serving.gateway.settings import GatewaySettings

GATEWAY = {"models": {"tiny": {"routes": [{"application": "tiny"}]}}}


@pytest.fixture
def listen_on(monkeypatch):
    def set_host(host):
        client = SimpleNamespace(http_config=SimpleNamespace(host=host))
        monkeypatch.setattr("ray.serve.context._get_global_client", lambda raise_if_no_controller_running: client)

    return set_host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "gpu-node"])
def test_builders_refuse_an_address_that_others_reach(listen_on, host):
    listen_on(host)
    with pytest.raises(ConfigError, match=f"^the gateway would answer whoever reaches {host} .*Give it a tenants_file"):
        build_gateway_app(GatewaySettings.model_validate(GATEWAY))
    with pytest.raises(ConfigError, match="^tiny would answer .*Put a gateway with a tenants_file before it"):
        build_app(PoolSettings(model="tiny"))
    with pytest.raises(ConfigError, match="^tiny would answer .*Put a gateway with a tenants_file before it"):
        build_pair_app(PairSettings.model_validate({"model": "tiny", "prefill": {}, "decode": {}}))


@pytest.mark.parametrize("host", [None, "127.0.0.1", "::1", "localhost"])
def test_loopback_needs_no_keys(listen_on, host):
    listen_on(host)
    build_gateway_app(GatewaySettings.model_validate(GATEWAY))


def test_tenants_open_the_gateway(listen_on, tmp_path):
    listen_on("0.0.0.0")
    build_gateway_app(GatewaySettings.model_validate(GATEWAY | {"tenants_file": str(tmp_path / "tenants.yaml")}))


def test_a_pool_of_the_command_line_stays_on_loopback():
    with pytest.raises(ValueError, match=r"0\.0\.0\.0 is an address that others reach"):
        ServeSettings(model="tiny", host="0.0.0.0")
