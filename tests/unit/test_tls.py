"""Certificate and key of the endpoint: what is refused, and what HAProxy is given."""

import http.server
import re
import ssl
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from certificates import write_certificate

from swiftkv.cluster import Tls, find_haproxy, read_tls, speaks_tls
from swiftkv.cluster.haproxy import NUM_PORTS, prepare_haproxy
from swiftkv.errors import ConfigError


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, str]:
    certificate, key = write_certificate(tmp_path / "pair")
    return {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}


def test_no_certificate_is_no_tls() -> None:
    assert read_tls({"host": "127.0.0.1", "ssl_certfile": None}, "here") is None


def test_paths_become_absolute(pair, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative = {name: str(Path(path).relative_to(tmp_path)) for name, path in pair.items()}
    assert read_tls(relative, "here") == Tls(**pair)


def test_one_without_the_other_is_refused(pair) -> None:
    for name in pair:
        with pytest.raises(ConfigError, match=f"^here: ssl_.*file is given and {name} is not"):
            read_tls({other: path for other, path in pair.items() if other != name}, "here")


def test_a_file_that_is_not_there_is_named(pair) -> None:
    with pytest.raises(ConfigError, match=r"^here: ssl_keyfile is absent.pem, and there is no such file"):
        read_tls(pair | {"ssl_keyfile": "absent.pem"}, "here")


def test_a_key_of_another_certificate_is_refused(pair, tmp_path) -> None:
    _, other = write_certificate(tmp_path / "other")
    with pytest.raises(ConfigError, match="cannot be used: .*KEY_VALUES_MISMATCH.* the key that it was made for"):
        read_tls(pair | {"ssl_keyfile": str(other)}, "here")


def test_what_is_no_certificate_is_refused(pair, tmp_path) -> None:
    (tmp_path / "text.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"text.pem .* cannot be used"):
        read_tls(pair | {"ssl_certfile": str(tmp_path / "text.pem")}, "here")


def test_a_key_with_a_password_is_refused_without_asking_for_it(tmp_path) -> None:
    certificate, key = write_certificate(tmp_path / "pair", password=b"secret")
    with pytest.raises(ConfigError, match="asks for a password; give one without"):
        read_tls({"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}, "here")


def test_who_speaks_tls_is_told_apart(pair) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair.values())
    for has_tls in (False, True):
        server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
        if has_tls:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            assert speaks_tls("127.0.0.1", server.server_port) is has_tls
        finally:
            server.shutdown()
            server.server_close()


CONFIGURATION = """\
global
    maxconn 10
defaults
    mode http
    timeout connect 1s
    timeout client 1s
    timeout server 1s
frontend prometheus
    bind :28101
    http-request use-service prometheus-exporter if { path /metrics }
frontend http_frontend
    bind 127.0.0.1:28102
    default_backend replicas
backend replicas
    server one 127.0.0.1:28103
listen stats
    bind *:28104
    stats enable
"""


@pytest.mark.skipif(find_haproxy() is None, reason="no HAProxy for this machine")
def test_only_the_endpoint_gets_the_certificate_and_haproxy_takes_it(pair, tmp_path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    environment = prepare_haproxy(folder, list(range(28101, 28101 + NUM_PORTS)), Tls(**pair))
    configuration = tmp_path / "haproxy.cfg"
    for _ in range(2):  # a renewed certificate is taken at the next start
        configuration.write_text(CONFIGURATION)
        script = environment["RAY_SERVE_HAPROXY_BINARY_PATH"]
        finished = subprocess.run([script, "-c", "-f", str(configuration)], capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
        binds = re.findall(r"^ *bind (.*)$", configuration.read_text(), flags=re.MULTILINE)
        assert binds[0] == "127.0.0.1:28101" and binds[2] == "127.0.0.1:28104"
        assert binds[1].startswith(f"127.0.0.1:28102 ssl crt {folder}/endpoint.pem ssl-min-ver TLSv1.2")
        both = folder / "endpoint.pem"
        assert stat.S_IMODE(both.stat().st_mode) == 0o600
        assert all(Path(path).read_text().strip() in both.read_text() for path in pair.values())
        pair.update(zip(pair, map(str, write_certificate(tmp_path / "pair")), strict=True))
    assert not list(folder.glob("endpoint.pem.*"))


def test_without_a_certificate_the_endpoint_stays_plain(tmp_path) -> None:
    environment = prepare_haproxy(tmp_path, list(range(28101, 28101 + NUM_PORTS)))
    assert not environment or "ssl" not in Path(environment["RAY_SERVE_HAPROXY_BINARY_PATH"]).read_text()
