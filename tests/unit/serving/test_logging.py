"""Serve's log stays open whatever a replica imports: a controller that returns takes a replica without one for dead.

vLLM and NIXL configure Python's logging when they are imported, which closes the handlers that there are.
"""

import subprocess
import sys
from pathlib import Path

OPEN = """
import logging, sys
def open_log():
    handler = logging.FileHandler(sys.argv[1])
    logging.getLogger("ray.serve").addHandler(handler)
    return handler
"""

GATEWAY = """
from swiftkv.serving.gateway.app import GatewayServer
handler = open_log()
assert "vllm" not in sys.modules
GatewayServer(None, {"models": {"m": {"routes": [{"application": "a"}]}}})
assert "vllm" in sys.modules
assert handler.stream is not None
"""

ENGINE = """
import swiftkv.serving.engine
handler = open_log()
import vllm.distributed.kv_transfer.kv_connector.v1.nixl
import swiftkv.engine.nixl
assert handler.stream is not None
"""


def run(code: str, log: Path) -> None:
    words = [sys.executable, "-c", OPEN + code, str(log)]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


def test_a_gateways_log_stays_open(tmp_path: Path) -> None:
    run(GATEWAY, tmp_path / "log")


def test_a_paired_replicas_log_stays_open(tmp_path: Path) -> None:
    run(ENGINE, tmp_path / "log")
