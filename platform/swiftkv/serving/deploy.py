"""Puts pools on a cluster through Serve's REST API and waits until they answer.

Declarative: what is sent is what `serve deploy` would send, so a config file and this give the same application.
Does not start a cluster, and leaves a failed deployment's cluster running for its owner to stop.
Called by: cli/serve.py, cli (quickstart), serving/keeping.py.
Calls: Ray's Serve and state REST APIs, serving/source.py, serving/fetching.py, serving/checks.py.
"""

import json
import re
import time
import urllib.request
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

from swiftkv.cluster import Cluster, RemoteCluster, Tls, find_haproxy, is_port_free, read_tls, speaks_tls
from swiftkv.errors import ClusterError, ConfigError, EngineError
from swiftkv.serving.checks import Applications, check_applications, check_placement
from swiftkv.serving.config import ServeSettings
from swiftkv.serving.fetching import fetch_version
from swiftkv.serving.rollout.serve_config import keep_versions, list_entries, read_record
from swiftkv.serving.rollout.settings import RolloutSettings
from swiftkv.serving.source import resolve_model

APPLICATION = "pool"
IMPORT_PATH = "swiftkv.serving.app:build_app"

# A first start compiles the model; on two slow cores that has taken two minutes.
START_TIMEOUT_S = 600.0
FIRST_REQUEST_TIMEOUT_S = 120.0
_POLL_S = 0.5
_NUM_ERROR_LINES = 12
_MAX_NODES = 10_000

_LOG_PREFIX = re.compile(r"^(\([^)]*pid=\d+\) )?((INFO|WARNING|ERROR) [\d-]+ [\d:]+ \[[^\]]*\] )?")
_EXCEPTION = re.compile(r"(?:^|\s)((?:[a-zA-Z_][\w.]*\.)?\w*(?:Error|Exception): (?!Traceback).+)")
_CONTINUATION = re.compile(r"  (?! *File |.*For further information)")

Progress = Callable[[str], None]

AnyCluster = Cluster | RemoteCluster

_in_use: list[object] = []
"""Fetched versions: the node's cache evicts none of them while this process lives."""


def deploy(cluster: Cluster, settings: ServeSettings, on_progress: Progress = lambda _: None) -> ServeSettings:
    """Serves the model and returns the settings with the model's folder and id, once requests are answered.

    A pool that is already deployed is replaced. `on_progress` gets a short text whenever the state changes.
    Raises: what `resolve_model` and `fetch_version` raise; ConfigError if the port is taken or the cluster too small;
    ClusterError if the cluster does not answer; EngineError with the replica's own error lines if the engine does not
    start.
    """
    on_progress("fetching the model")
    settings = resolve_model(settings)
    if settings.published is not None:
        # As its replicas do; but here it may take as long as it takes, and START_TIMEOUT_S is for engines.
        _in_use.append(fetch_version(settings.published, with_weights=not settings.stream))
    client = connect(cluster)
    _check_endpoint(client, settings.host, settings.port, "--port", is_here=True)
    _check_tls(cluster, None)
    _check_resources(cluster, {APPLICATION: settings})
    on_progress("building the application")
    client.deploy_applications(build_serve_config(settings))
    _wait_until_running(client, cluster, [APPLICATION], on_progress)
    on_progress("answering a first request")
    _send_first_request(cluster, settings)
    return settings


def deploy_config(cluster: AnyCluster, config: dict[str, Any], on_progress: Progress = lambda _: None) -> str:
    """Deploys a Serve config file's content and returns the endpoint's base URL, once every application runs.

    Applications that are already deployed and not in the config are removed, as `serve deploy` does; unlike there, what
    a rollout of the config has running stays.
    Raises: ConfigError if Serve refuses the config, the port is taken, the cluster too small or started with another
    certificate; ClusterError if the cluster does not answer; EngineError with the replica's own error lines if an
    application does not start.
    """
    client = connect(cluster)
    options = dict(config.get("http_options") or {})
    host, port = options.get("host", "127.0.0.1"), options.get("port", 8000)
    tls = read_tls(options, "http_options")
    _check_endpoint(client, host, port, "http_options.port", is_here=isinstance(cluster, Cluster))
    _check_tls(cluster, tls)
    if tls is not None and find_haproxy():
        # HAProxy has it. In the options it would make the replicas behind speak TLS too, which HAProxy does not expect.
        options = {name: value for name, value in options.items() if not name.startswith("ssl_")}
    applications = check_applications(config["applications"], "Serve config")
    _check_resources(cluster, applications)
    rollouts = {name: found for name, found in applications.items() if isinstance(found, RolloutSettings)}
    entries = keep_versions(config["applications"], client.get_serve_details(), rollouts)
    on_progress("building the applications")
    try:
        http_options = {**options, "host": host, "port": port}
        client.deploy_applications({**config, "http_options": http_options, "applications": entries})
    except RuntimeError as error:
        raise ConfigError(f"Ray Serve refused the config: {error}") from error
    names = [entry["name"] for entry in config["applications"]]
    _wait_until_running(client, cluster, names, on_progress)
    for name, rollout in rollouts.items():
        _wait_for_version(client, name, rollout, on_progress)
    _wait_until_running(client, cluster, names, on_progress)  # the gateway has its routes
    if tls is not None and not speaks_tls(host, port):
        raise ClusterError(f"{host}:{port} answers without TLS, although http_options name a certificate.")
    return f"{'http' if tls is None else 'https'}://{host}:{port}/v1"


def undeploy(cluster: Cluster) -> None:
    """Removes every pool from the cluster; the cluster stays."""
    connect(cluster).delete_applications()


def build_serve_config(settings: ServeSettings) -> dict[str, Any]:
    """The settings as a Serve config, the format of the files in deployments/serve."""
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": settings.host, "port": settings.port},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": settings.pool().model_dump(exclude_none=True),
            }
        ],
    }


def connect(cluster: AnyCluster) -> Any:
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    try:
        return ServeSubmissionClient(cluster.dashboard_url, headers=cluster.headers())
    except (ConnectionError, RuntimeError) as error:
        raise ClusterError(f"the cluster at {cluster.dashboard_url} does not answer: {error}") from error


def check_port(port: int, place: str) -> None:
    """Raises: ConfigError naming `place`, where it is set, if another program of this machine has the port."""
    if not is_port_free(port):
        raise ConfigError(f"{place} is {port}, which another program has. Choose another port, or end that program.")


def _check_endpoint(client: Any, host: str, port: int, place: str, is_here: bool) -> None:
    bound = client.get_serve_details().get("http_options") or {}
    if bound.get("port"):
        if (bound["host"], bound["port"]) != (host, port):
            raise ConfigError(
                f"this cluster already serves on {bound['host']}:{bound['port']} and cannot move to "
                f"{host}:{port}. Use that port, or stop the cluster with `swiftkv down` first."
            )
    elif is_here:
        check_port(port, place)


def _check_tls(cluster: AnyCluster, tls: Tls | None) -> None:
    if isinstance(cluster, RemoteCluster):
        if tls is not None:
            raise ConfigError(
                "http_options name a certificate, which is the head's to have on a cluster of several nodes: take "
                "ssl_certfile and ssl_keyfile out, and start the head with them (swiftkv node head --ssl-certfile FILE "
                "--ssl-keyfile FILE), or end TLS before it."
            )
    elif cluster.tls != tls:
        had = f"with the certificate {cluster.tls.ssl_certfile}" if cluster.tls else "without TLS"
        raise ConfigError(f"the cluster that runs was started {had}. Stop it with `swiftkv down` first.")


def _check_resources(cluster: AnyCluster, applications: Applications) -> None:
    from ray.util.state import StateApiClient
    from ray.util.state.common import ListApiOptions, StateResource
    from ray.util.state.exception import RayStateApiException

    client = StateApiClient(address=cluster.dashboard_url, headers=cluster.headers())
    options = ListApiOptions(filters=[("state", "=", "ALIVE")], limit=_MAX_NODES)
    try:
        nodes = client.list(StateResource.NODES, options=options, raise_on_missing_output=False)
    except RayStateApiException as error:
        raise ClusterError(f"the cluster at {cluster.dashboard_url} does not say what it has: {error}") from error
    check_placement(applications, [node["resources_total"] for node in nodes], "deploying")


def _wait_until_running(client: Any, cluster: AnyCluster, names: list[str], on_progress: Progress) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    reported = ""
    while time.monotonic() < deadline:
        applications = client.get_serve_details()["applications"]
        waiting = [name for name in names if applications.get(name, {}).get("status") != "RUNNING"]
        if not waiting:
            return
        for name in waiting:
            if applications.get(name, {}).get("status") in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise EngineError(_describe_failure(applications[name], cluster))
        state = _describe_state(applications.get(waiting[0], {}))
        if state != reported:
            on_progress(state)
            reported = state
        time.sleep(_POLL_S)
    place = cluster.folder if isinstance(cluster, Cluster) else cluster.dashboard_url
    raise EngineError(f"{', '.join(waiting)} not up after {START_TIMEOUT_S:.0f} s. Logs: {place}")


def _wait_for_version(client: Any, name: str, rollout: RolloutSettings, on_progress: Progress) -> None:
    on_progress(f"starting what {rollout.model}@{rollout.alias} is")
    deadline = time.monotonic() + rollout.start_timeout_s + rollout.warm_timeout_s
    while time.monotonic() < deadline:
        record = read_record(list_entries(client.get_serve_details()), name)
        if record.stable is not None:
            return
        if record.rejected is not None:
            raise EngineError(f"{name}: {rollout.name_application(record.rejected.version)}: {record.rejected.reason}")
        time.sleep(_POLL_S)
    raise EngineError(f"{name}: no version of {rollout.model} ran in time.")


def _send_first_request(cluster: Cluster, settings: ServeSettings) -> None:
    # The first one takes seconds: vLLM and Serve set up on it what they then keep. No user should meet that.
    body = json.dumps({"model": settings.model_id, "prompt": "a", "max_tokens": 1}).encode()
    request = urllib.request.Request(
        f"{settings.base_url}/completions", data=body, headers={"Content-Type": "application/json"}
    )
    try:
        urllib.request.urlopen(request, timeout=FIRST_REQUEST_TIMEOUT_S).close()
    except OSError as error:  # HTTP errors, refused connections and time-outs are all kinds of it
        lines = [f"the engine is up but {settings.base_url} does not answer: {error}"]
        lines += [f"  {line}" for line in find_engine_errors(cluster.folder)[-_NUM_ERROR_LINES:]]
        raise EngineError("\n".join(lines)) from error


def _describe_state(application: dict[str, Any]) -> str:
    starting = [
        name.partition(":")[2] or name
        for name, deployment in application.get("deployments", {}).items()
        if deployment["status"] != "HEALTHY" and name != "ingress"
    ]
    return f"starting the engine of {', '.join(starting)}" if starting else "building the application"


def _describe_failure(application: dict[str, Any], cluster: AnyCluster) -> str:
    messages = [application.get("message", "")]
    messages += [d.get("message", "") for d in application.get("deployments", {}).values()]
    found = find_engine_errors(cluster.folder) if isinstance(cluster, Cluster) else []  # others' logs are elsewhere
    lines = found or _shorten(messages)
    return "\n".join(["the engine did not start:", *(f"  {line}" for line in lines[-_NUM_ERROR_LINES:])])


def find_engine_errors(folder: Path) -> list[str]:
    """What the exceptions in the workers' logs say: vLLM's engine process states its cause only there."""
    found: dict[str, None] = {}  # in order, without repetition
    for path in sorted(folder.glob("r/session_*/logs/worker-*")):
        try:
            text = path.read_text("utf-8", errors="replace")
        except FileNotFoundError:  # Ray removes the logs of workers that it started for nothing
            continue
        lines = [_LOG_PREFIX.sub("", line) for line in text.splitlines()]
        for start, line in enumerate(lines):
            if match := _EXCEPTION.search(line):
                # A settings error of vLLM's goes on for two lines: the field, and what is wrong with it.
                rest = takewhile(_CONTINUATION.match, lines[start + 1 : start + 3])
                found.setdefault(" ".join([match[1], *(text.strip() for text in rest)]))
    return list(found)


def _shorten(messages: list[str]) -> list[str]:
    return [line for message in messages for line in message.splitlines() if line.strip()]
