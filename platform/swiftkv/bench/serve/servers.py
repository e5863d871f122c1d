"""What the serving bench sends its loads to: the platform on a cluster of its own, and vLLM's own server alone.

Called by: bench/serve.py and the files of its rows. Calls: cluster, serving/deploy.py, vLLM's OpenAI server.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from swiftkv.cluster import Cluster, choose_ports, start_cluster, stop_cluster
from swiftkv.engine import one_process
from swiftkv.engine.settings import EngineSettings
from swiftkv.errors import EngineError
from swiftkv.metrics import METERING_KEY
from swiftkv.serving.checks import check_applications
from swiftkv.serving.deploy import Progress, deploy_config

MODEL_ID = "bench"
_START_TIMEOUT_S = 600.0
_EXPORT_S = 6.0
_SCRAPE_S = 10.0


class Platform:
    """Applications behind one endpoint on a running cluster."""

    def __init__(self, cluster: Cluster, config: dict[str, Any], on_progress: Progress) -> None:
        self.cluster = cluster
        self._config = config
        self._on_progress = on_progress

    def deploy(self, applications: list[dict[str, Any]]) -> str:
        """The endpoint's base URL once all run; applications deployed before and not among these are removed."""
        check_applications(applications, "bench")
        return deploy_config(self.cluster, {**self._config, "applications": applications}, self._on_progress)

    def read_counter(self, name: str, **labels: str) -> float:
        """What Ray's agent exports of one of our counters (or of vLLM's), summed over all that have these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = self._fetch_metrics().decode().splitlines()
        found = [line for line in lines if line.startswith(f"ray_{name}{{") and all(text in line for text in wanted)]
        return sum(float(line.rpartition(" ")[2]) for line in found)

    def wait_for_counter(self, name: str, **labels: str) -> float:
        """The same once it has stopped rising: what actors count is exported seconds later."""
        before, value = -1.0, self.read_counter(name, **labels)
        while value != before:
            time.sleep(_EXPORT_S)
            before, value = value, self.read_counter(name, **labels)
        return value

    def scraped(self, measure: Callable[[], float]) -> Callable[[], float]:
        """The measure, while the metrics are fetched as often as Prometheus does by the shipped configuration."""

        def run() -> float:
            is_over = threading.Event()
            thread = threading.Thread(target=self._fetch_until, args=(is_over,), name="scraper")
            thread.start()
            try:
                return measure()
            finally:
                is_over.set()
                thread.join()

        return run

    def count_replicas(self, application: str, prefix: str) -> int:
        """How many replicas of the deployment whose name begins so take requests now."""
        client = ServeSubmissionClient(self.cluster.dashboard_url, headers=self.cluster.headers())
        deployments = client.get_serve_details()["applications"][application]["deployments"]
        (deployment,) = (value for name, value in deployments.items() if name.startswith(prefix))
        return sum(replica["state"] == "RUNNING" for replica in deployment["replicas"])

    def _fetch_until(self, is_over: threading.Event) -> None:
        while True:
            self._fetch_metrics()
            if is_over.wait(_SCRAPE_S):
                return

    def _fetch_metrics(self) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._find_metrics_port()}/metrics", timeout=10) as response:
            return bytes(response.read())

    def _find_metrics_port(self) -> str:
        words = psutil.Process(self.cluster.pid).cmdline()
        return words[words.index("--metrics-export-port") + 1]


@contextmanager
def run_platform(on_progress: Progress, is_metered: bool = True) -> Iterator[Platform]:
    """A cluster without applications, in a folder of its own, ended with everything on it."""
    with tempfile.TemporaryDirectory(prefix="swk-") as home:
        with _set_environment({"SWIFTKV_HOME": home} | ({} if is_metered else {METERING_KEY: "off"})):
            cluster = start_cluster()
        with _set_environment({"SWIFTKV_HOME": home}):
            try:
                (port,) = choose_ports(1)
                options = {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": port}}
                yield Platform(cluster, options, on_progress)
            finally:
                stop_cluster(cluster)


@contextmanager
def _set_environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def build_version(kind: str, settings: dict[str, Any], name: str = "version") -> dict[str, Any]:
    """A model version as an application; `kind` is "pool" or "pair", `settings` are those of `PoolSettings` or
    `PairSettings`."""
    return _build_application(
        name, None, f"swiftkv.serving.app:build_{kind}_version", {"model_id": MODEL_ID, **settings}
    )


def build_gateway(applications: list[str], capacity: dict[str, Any], **others: Any) -> dict[str, Any]:
    """The gateway before versions of the bench's model."""
    model = {"routes": [{"application": name} for name in applications], "capacity": capacity}
    settings = {"models": {MODEL_ID: model}, "limits": {"ttft_target_s": None}, **others}
    return _build_application("gateway", "/", "swiftkv.serving.gateway.app:build_gateway_app", settings)


def _build_application(name: str, route: str | None, import_path: str, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "route_prefix": route, "import_path": import_path, "args": args}


@contextmanager
def run_bare_server(model: Path, settings: EngineSettings, in_one_process: bool = False) -> Iterator[str]:
    """The base URL of vLLM's OpenAI server on the model in a folder, without Ray; ended at the end.

    Raises: EngineError with the end of its log if it does not start.
    """
    (port,) = choose_ports(1)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(model), "--served-model-name", MODEL_ID, "--no-enable-log-requests"]
    arguments, own = settings.build_engine_arguments(), settings.build_environment()
    if settings.cpu_cores is not None and in_one_process:
        num_threads = len(one_process.list_cores(settings.cpu_cores))
        arguments |= one_process.build_arguments()
        own = one_process.build_environment(num_threads, settings.cpu_cores)
    command += list_options(arguments)
    environment = {**os.environ, **own, "VLLM_LOGGING_LEVEL": "WARNING"}
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_until_ready(server, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def list_options(arguments: dict[str, Any]) -> list[str]:
    """vLLM's engine arguments as options of its command line."""
    options = []
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{option}" if value else f"--no-{option}")
        else:
            options.append(f"--{option}={json.dumps(value) if isinstance(value, dict) else value}")
    return options


def _wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Any) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    log.seek(0)
    tail = "\n".join(log.read().decode(errors="replace").splitlines()[-12:])
    raise EngineError(f"vLLM's own server did not start:\n{tail}")
