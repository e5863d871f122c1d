"""One node of a cluster of several: behind a token, at an address that others reach, or not at all."""

import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from swiftkv.cli.main import app
from swiftkv.cluster import haproxy, node
from swiftkv.cluster.node import build_head, build_worker
from swiftkv.errors import ClusterError

ADDRESS = "192.0.2.7"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4 + "\n")
    return {"RAY_AUTH_TOKEN_PATH": str(token), "PATH": "/usr/bin", "RAY_ADDRESS": "elsewhere:1", "AWS_REGION": "here"}


@pytest.fixture(autouse=True)
def _temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def read_options(command: list[str]) -> dict[str, str]:
    start = command.index("start")
    assert command[start - 2 : start] == ["-m", "ray.scripts.scripts"]
    words = iter(command[start + 1 :])
    flags = {"--block", "--head", "--no-monitor", "--disable-usage-stats"}
    return {word: "" if word in flags else next(words) for word in words}


def test_head_listens_where_others_reach_it_and_holds_no_work(environment) -> None:
    built = build_head(environment, 0, 200_000_000, ADDRESS)
    options = read_options(built.command)
    assert {"--head", "--block", "--no-monitor", "--disable-usage-stats"} <= set(options)
    assert options["--node-ip-address"] == options["--dashboard-host"] == ADDRESS
    assert (options["--port"], options["--dashboard-port"]) == ("6379", "8265")
    assert (options["--num-cpus"], options["--object-store-memory"]) == ("0", "200000000")


def test_head_puts_haproxy_before_the_pools(environment) -> None:
    built = build_head(environment, 0, 200_000_000, ADDRESS)
    if haproxy.prepare_haproxy(Path(environment["RAY_AUTH_TOKEN_PATH"]).parent, [1, 2, 3]):
        assert built.environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
        assert Path(built.environment["RAY_SERVE_HAPROXY_BINARY_PATH"]).is_file()


@pytest.mark.parametrize(("given", "address"), [("head", "head:6379"), ("192.0.2.1:7000", "192.0.2.1:7000")])
def test_worker_joins_the_head(environment, given: str, address: str) -> None:
    options = read_options(build_worker(environment, given, 3, 200_000_000, ADDRESS).command)
    assert options["--address"] == address
    assert options["--num-cpus"] == "3"
    assert not options.keys() & {"--head", "--port", "--dashboard-host"}


def test_worker_offers_all_cpus_unless_told(environment) -> None:
    options = read_options(build_worker(environment, "head", None, 200_000_000, ADDRESS).command)
    assert int(options["--num-cpus"]) >= 1


def test_nodes_ask_for_the_token_and_follow_no_other_cluster(environment) -> None:
    for built in (
        build_head(environment, 0, 200_000_000, ADDRESS),
        build_worker(environment, "head", 1, 200_000_000, ADDRESS),
    ):
        assert built.environment["RAY_AUTH_MODE"] == "token"
        assert built.environment["RAY_AUTH_TOKEN_PATH"] == environment["RAY_AUTH_TOKEN_PATH"]
        assert "RAY_ADDRESS" not in built.environment
        assert built.environment["AWS_REGION"] == "here"


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (None, "RAY_AUTH_TOKEN_PATH is not set, and no node starts without a token"),
        ("", "has 0 characters, of 32 at least"),
        ("short", "has 5 characters, of 32 at least"),
    ],
)
def test_no_node_starts_without_a_token(environment, tmp_path: Path, token: str | None, said: str) -> None:
    if token is None:
        del environment["RAY_AUTH_TOKEN_PATH"]
    else:
        (tmp_path / "token").write_text(token)
    with pytest.raises(ClusterError, match=said):
        build_worker(environment, "head", 1, 200_000_000, ADDRESS)


def test_token_that_cannot_be_read_is_named(environment, tmp_path: Path) -> None:
    environment["RAY_AUTH_TOKEN_PATH"] = str(tmp_path / "none")
    with pytest.raises(ClusterError, match="none.*cannot be read.*openssl rand"):
        build_head(environment, 0, 200_000_000, ADDRESS)


@pytest.mark.parametrize("address", ["127.0.1.1", "127.0.0.1"])
def test_host_s_name_that_means_loopback_is_refused(monkeypatch, address: str) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda name: address)
    with pytest.raises(ClusterError, match="which no other node reaches; give --address"):
        node.find_address()


def test_node_s_address_is_that_of_the_host_s_name(monkeypatch, environment) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda name: ADDRESS)
    options = read_options(build_worker(environment, "head", 1, 200_000_000, None).command)
    assert options["--node-ip-address"] == ADDRESS


def test_command_becomes_ray(environment, monkeypatch) -> None:
    became = []
    monkeypatch.setattr("os.execve", lambda *given: became.append(given))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", environment["RAY_AUTH_TOKEN_PATH"])
    arguments = ["node", "worker", "head", "--address", ADDRESS, "--object-store-mb", "100"]
    finished = CliRunner().invoke(app, arguments)
    assert finished.exit_code == 0, finished.output
    ((program, command, _),) = became
    assert command[0] == program
    assert read_options(command)["--object-store-memory"] == "100000000"
