"""A local S3 server over real HTTP: moto's, in a process of its own. Needs the extra `dev`.

Called by: bench/registry.py, tests.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from swiftkv.errors import RegistryError

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"}
START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class S3Server:
    """Where it answers."""

    endpoint: str

    @property
    def environment(self) -> Mapping[str, str]:
        """What a client's environment must say."""
        return CREDENTIALS | {"AWS_ENDPOINT_URL": self.endpoint}

    def create_bucket(self, name: str) -> str:
        """The URL of a new bucket."""
        urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/{name}", method="PUT"))
        return f"s3://{name}"


@contextmanager
def run_s3_server() -> Iterator[S3Server]:
    """A server on loopback, ended with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)]
    # Every object of some size goes to the disk, as in a server that is not for tests.
    environment = os.environ | {"MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(2**20)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            server = S3Server(f"http://127.0.0.1:{port}")
            _wait(server, process)
            yield server
        finally:
            process.kill()


def _wait(server: S3Server, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(server.endpoint)
            return
        except (urllib.error.URLError, ConnectionError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RegistryError("moto's S3 server did not start. Install the extra dev.") from None
            time.sleep(0.05)
