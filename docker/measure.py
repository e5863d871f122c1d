"""Starts an image's commands as compose.yaml does and has the endpoint answer: sizes and seconds into reports/images.

    .venv/bin/python docker/measure.py swiftkv-serve:0.1.0-cpu --builder docker|buildah

On one node on loopback, with moto's server in the store's place; all commands of the image share the machine's network,
so its ports must be free. Root only with buildah. What it starts, it ends.
Run by hand. Calls: docker or buildah, prepare.py (a tenant), seed.py and serve/cpu.yaml inside the image, moto.
"""

import argparse
import json
import os
import platform
import re
import resource
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
from prepare import write_tenants

HERE = Path(__file__).resolve().parent
REPORT = HERE.parent / "reports" / "images"
USER = 10001
DASHBOARD = "http://127.0.0.1:8265"
HEALTH = "http://127.0.0.1:52365/api/healthz"
ENDPOINT = "http://127.0.0.1:8000"
START_TIMEOUT_S = 300.0
NUM_CPUS = 2
_NOFILE = min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
OPEN_FILES = ("--ulimit", f"nofile={_NOFILE}:{_NOFILE}")
"""As in compose.yaml, where this machine allows it."""
KEY = "measured"


class Image:
    """One image, in a container of buildah's whose files all commands share, or in a container of docker's for each."""

    def __init__(self, builder: str, tag: str, folder: Path, environment: Mapping[str, str]) -> None:
        self._builder, self._tag = builder, tag
        self._volumes = {
            folder / "home": "/var/lib/swiftkv",
            folder / "tenants": "/etc/swiftkv/tenants",
            folder / "token": "/run/secrets/ray_token",
            HERE / "seed.py": "/etc/swiftkv/seed.py",
            HERE / "serve" / "cpu.yaml": "/etc/swiftkv/serve.yaml",
        }
        self._environment = environment
        self._container = call("buildah", "from", *OPEN_FILES, tag) if builder == "buildah" else ""

    def close(self) -> None:
        """Removes what was made of the image, not the image."""
        if self._container:
            call("buildah", "rm", self._container)

    def size_bytes(self) -> int:
        """Of all layers, unpacked."""
        if self._builder == "docker":
            return int(call("docker", "image", "inspect", "--format", "{{.Size}}", self._tag))
        root = call("buildah", "mount", self._container)
        return int(call("du", "--summarize", "--bytes", "--one-file-system", root).split()[0])

    def start(self, *words: str, log: Path) -> subprocess.Popen[bytes]:
        """Starts a command of the image, as its user, on this machine's network."""
        options = [word for place, there in self._volumes.items() for word in ("--volume", f"{place}:{there}")]
        options += [word for name, value in self._environment.items() for word in ("--env", f"{name}={value}")]
        if self._builder == "docker":
            command = ["docker", "run", "--rm", "--init", "--network", "host", *OPEN_FILES, "--shm-size", "1g"]
            command += [*options, self._tag]
        else:
            command = ["buildah", "run", "--isolation", "chroot", "--user", f"{USER}:{USER}", *options]
            command += [self._container, "--", "entrypoint"]
        with log.open("wb") as file:
            return subprocess.Popen([*command, *words], stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    def run(self, *words: str, log: Path) -> None:
        """As `start`, to its end. Raises: RuntimeError with what it said if it fails."""
        if self.start(*words, log=log).wait():
            raise RuntimeError(f"{' '.join(words)}:\n{log.read_text()}")


def call(*words: str) -> str:
    """What a command prints. Raises: CalledProcessError if it fails."""
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def measure(builder: str, tag: str) -> dict[str, Any]:
    """Seconds of each step until an answer has come, and the image's size."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swiftkv-image-")))
        key = write_inputs(folder)
        store = stack.enter_context(serve_s3())
        environment = {
            "RAY_AUTH_TOKEN_PATH": "/run/secrets/ray_token",
            "AWS_ENDPOINT_URL": store,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": KEY,
        }
        image = Image(builder, tag, folder, environment)
        stack.callback(image.close)
        report: dict[str, Any] = {"image": tag, "size_bytes": image.size_bytes()}
        seconds = report["seconds"] = {}

        started = time.monotonic()
        node = ("swiftkv", "node", "head", "--num-cpus", str(NUM_CPUS), "--address", "127.0.0.1")
        head = image.start(*node, log=folder / "head.log")
        stack.callback(end_tree, head)
        wait_for(lambda: ask(HEALTH)[0] == 200, head, folder / "head.log")
        seconds["head healthy"] = time.monotonic() - started

        started = time.monotonic()
        image.run("python", "/etc/swiftkv/seed.py", "s3://swiftkv/registry", log=folder / "seed.log")
        seconds["bucket and model"] = time.monotonic() - started

        started = time.monotonic()
        image.run("swiftkv", "deploy", "/etc/swiftkv/serve.yaml", "--address", DASHBOARD, log=folder / "deploy.log")
        wait_for(lambda: ask(f"{ENDPOINT}/ready")[0] == 200, head, folder / "deploy.log")
        seconds["two pools ready"] = time.monotonic() - started

        body = {"model": "demo", "prompt": "def main(", "max_tokens": 16}
        report["status without a key"] = ask(f"{ENDPOINT}/v1/completions", body)[0]
        started = time.monotonic()
        status, answer = ask(f"{ENDPOINT}/v1/completions", body, key)
        seconds["answer of 16 tokens"] = time.monotonic() - started
        if status != 200:
            raise RuntimeError(f"the endpoint answered {status}: {json.dumps(answer)}")
        report |= {"usage": answer["usage"]}
        report["jobs without the token"] = ask(f"{DASHBOARD}/api/jobs/")[0]
        image.run("id", "-u", log=folder / "id.log")
        report["user"] = int((folder / "id.log").read_text())
    return report


def write_inputs(folder: Path) -> str:
    """Token, tenant and home, for the image's user. Returns the tenant's key."""
    (folder / "token").write_text(secrets.token_hex(32))
    (folder / "home").mkdir()
    os.chown(folder / "home", USER, USER)
    folder.chmod(0o755)
    said: list[str] = []
    write_tenants(folder / "tenants", say=said.append)
    match = re.search(r"swk_\S+", " ".join(said))
    assert match, said
    return match[0]


@contextmanager
def serve_s3() -> Iterator[str]:
    """An S3 server in the place of compose.yaml's, and its URL."""
    program = Path(sys.executable).with_name("moto_server")
    server = subprocess.Popen([str(program), "-H", "127.0.0.1", "-p", "8333"], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: ask("http://127.0.0.1:8333/moto-api/")[0] == 200, server, None)
        yield "http://127.0.0.1:8333"
    finally:
        server.terminate()
        server.wait()


def ask(url: str, body: object = None, key: str | None = None) -> tuple[int, dict[str, Any]]:
    """Status and JSON of an answer; 0 where nothing answers."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as response:
            status, text = response.status, response.read()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read()
    except OSError:
        return 0, {}
    try:
        return status, dict(json.loads(text))
    except (TypeError, ValueError):
        return status, {}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path | None) -> None:
    """Raises: RuntimeError with the log if the process ends first, or after five minutes."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{process.args}:\n{log.read_text() if log else ''}")
        time.sleep(0.2)


def find_tree(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The process and all that it started."""
    top = psutil.Process(process.pid)
    return [top, *top.children(recursive=True)]


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """Ends it and what it started, politely first."""
    if process.poll() is not None:
        return
    processes = find_tree(process)
    for each in processes[::-1]:
        each.terminate()
    _, alive = psutil.wait_procs(processes, timeout=20)
    for each in alive:
        each.kill()
    process.wait()


def write_report(report: Mapping[str, Any], builder: str) -> None:
    """JSON and a table, named after the image."""
    name = str(report["image"]).rpartition("/")[2].replace(":", "-")
    where = {"cores": os.cpu_count(), "processor": read_processor(), "system": platform.platform(), "builder": builder}
    REPORT.mkdir(parents=True, exist_ok=True)
    (REPORT / f"{name}.json").write_text(json.dumps({**report, "hardware": where}, indent=1) + "\n")
    rows = [("size, unpacked", f"{report['size_bytes'] / 1e9:.2f} GB")]
    rows += [(step, f"{seconds:.1f} s") for step, seconds in report["seconds"].items()]
    rows += [(name, str(report[name])) for name in ("status without a key", "jobs without the token", "user")]
    table = "".join(f"| {name} | {value} |\n" for name, value in rows)
    (REPORT / f"{name}.md").write_text(
        f"# {report['image']}\n\n`docker/measure.py {report['image']} --builder {builder}` on {where['cores']} cores "
        f"({where['processor']}).\n\n| what | figure |\n| --- | --- |\n{table}"
    )
    print(table)


def read_processor() -> str:
    """Its name, as Linux has it."""
    match = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    return match[1] if match else platform.machine()


def main() -> int:
    """Measures the image named on the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image")
    builder = "docker" if shutil.which("docker") else "buildah"
    parser.add_argument("--builder", choices=["docker", "buildah"], default=builder)
    options = parser.parse_args()
    write_report(measure(options.builder, options.image), options.builder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
