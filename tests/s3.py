"""A local S3 server over real HTTP: moto's, in a process of its own, with one bucket."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

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
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
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
            assert process.poll() is None and time.monotonic() < deadline, "moto's server did not start"
            time.sleep(0.05)
