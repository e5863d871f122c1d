"""Serve's config as the rollout reads and changes it: its versions' applications, the gateway's routes, its own record.

Declarative, through Serve's REST API: what `serve deploy` sends. Ray offers a replica two more ways. `serve.run`
deploys one application without touching others, but knows no `autoscaling_policy` of an application (Ray 2.60), without
which the pools of a version would not size themselves; and it cannot change the gateway, whose routes would then need a
store of their own. Serve's controller is private. One write of the whole config changes applications, routes and
record together, so a replica killed between two steps leaves nothing half done. Serve has no compare-and-swap: a write
that another one overtakes is taken back, and the next look begins again from what is there.
Functions here are pure; `ServeClient` alone talks to the cluster.
Called by: rollout/rollout.py, serving/deploy.py. Calls: Ray's Serve REST API.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from swiftkv.errors import ConfigError
from swiftkv.serving.gateway.settings import GatewaySettings
from swiftkv.serving.rollout.record import Record
from swiftkv.serving.rollout.settings import RolloutSettings

DEPLOYMENT = "rollout"

Entry = dict[str, Any]
"""One application of a Serve config."""


class ServeClient:
    """Serve's REST API on this cluster, from inside it."""

    def read(self) -> dict[str, Any]:
        """What there is. Raises: OSError or RuntimeError if Serve does not answer."""
        details: dict[str, Any] = self._connect().get_serve_details()
        return details

    def write(self, config: dict[str, Any]) -> None:
        """Makes it so. Raises: as `read`."""
        self._connect().deploy_applications(config)

    def _connect(self) -> Any:
        import ray
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
        from ray.dashboard.utils import ray_address_to_api_server_url

        # It adds the cluster's token by itself, which each of Ray's processes has in its environment.
        return ServeSubmissionClient(ray_address_to_api_server_url(ray.get_runtime_context().gcs_address))


@dataclass(frozen=True)
class ApplicationState:
    """How an application is."""

    status: str
    """As Serve says it: RUNNING, DEPLOYING, DEPLOY_FAILED, UNHEALTHY."""
    message: str


def list_entries(details: Mapping[str, Any]) -> list[Entry]:
    """The applications of the config that Serve has."""
    applications = details["applications"].values()
    return [found["deployed_app_config"] for found in applications if found.get("deployed_app_config")]


def find_versions(details: Mapping[str, Any], settings: RolloutSettings) -> dict[str, ApplicationState]:
    """The model's versions that have an application."""
    prefix = settings.name_application("")
    return {
        name.removeprefix(prefix): ApplicationState(found["status"], found.get("message", ""))
        for name, found in details["applications"].items()
        if name.startswith(prefix) and found.get("deployed_app_config")
    }


def is_building(details: Mapping[str, Any]) -> bool:
    """Whether an application is being imported: Serve begins that anew with every write (Ray 2.60)."""
    return any(
        found["status"] == "DEPLOYING" and not found.get("deployments") for found in details["applications"].values()
    )


def read_record(entries: Iterable[Entry], own: str) -> Record:
    """What is remembered in the entry of the rollout `own`."""
    return Record.model_validate(_find_user_config(_find(entries, own), DEPLOYMENT) or {})


def read_gateway(entries: Iterable[Entry], settings: RolloutSettings) -> GatewaySettings:
    """The settings that the gateway runs with.

    Raises: ConfigError if there is no such gateway, or it does not have the model.
    """
    entry = _find(entries, settings.gateway)
    values = _find_user_config(entry, "gateway") or entry.get("args") or {}
    parsed = GatewaySettings.model_validate(values)
    if settings.served_id not in parsed.models:
        raise ConfigError(
            f"the gateway {settings.gateway!r} has no model {settings.served_id!r}; add it, without routes."
        )
    return parsed


def build_gateway(gateway: GatewaySettings, settings: RolloutSettings, record: Record) -> GatewaySettings:
    """The gateway's settings with the routes that the record asks for."""
    weights = {record.stable: 1 - record.share} if record.stable else {}
    if record.candidate and record.share:
        weights[record.candidate] = record.share
    routes = [{"application": settings.name_application(name), "weight": share} for name, share in weights.items()]
    compares = record.share > 0 and settings.compared_frac > 0
    comparison = {"frac": settings.compared_frac, "tokens": settings.compared_tokens} if compares else None
    values = gateway.model_dump(mode="json")
    values["models"][settings.served_id] |= {"routes": routes, "comparison": comparison}
    return GatewaySettings.model_validate(values)


def build_entries(
    entries: Collection[Entry], settings: RolloutSettings, own: str, record: Record, versions: Iterable[str]
) -> list[Entry]:
    """The config's applications with those of `versions` and no others of the model, the routes, and the record.

    Raises: ConfigError as `read_gateway`.
    """
    from swiftkv.serving.gateway.app import build_overrides

    known = {entry["name"]: entry for entry in entries}
    prefix = settings.name_application("")
    names = {settings.name_application(version): version for version in versions}
    kept = {name: entry for name, entry in known.items() if not name.startswith(prefix)}
    kept |= {name: known.get(name) or _build_entry(settings, version) for name, version in names.items()}
    gateway = build_gateway(read_gateway(entries, settings), settings, record)
    for override in build_overrides(gateway):
        kept[settings.gateway] = _override(kept[settings.gateway], override)
    remembered = {"name": DEPLOYMENT, "user_config": record.model_dump(mode="json")}
    kept[own] = _override(kept[own], remembered)
    return list(kept.values())


def keep_versions(
    entries: list[Entry], details: Mapping[str, Any], rollouts: Mapping[str, RolloutSettings]
) -> list[Entry]:
    """A file's applications with the versions that its rollouts have running, which no file names."""
    current = list_entries(details)
    for own, settings in rollouts.items():
        if any(entry["name"] == own for entry in current):
            prefix = settings.name_application("")
            running = [entry for entry in current if entry["name"].startswith(prefix)]
            versions = find_versions(details, settings)
            entries = build_entries([*entries, *running], settings, own, read_record(current, own), versions)
    return entries


def build_config(details: Mapping[str, Any], entries: list[Entry]) -> dict[str, Any]:
    """The whole config with other applications; what else there is stays."""
    kept = ("proxy_location", "http_options", "grpc_options", "target_capacity")
    return {name: details[name] for name in kept if details.get(name) is not None} | {"applications": entries}


def _build_entry(settings: RolloutSettings, version: str) -> Entry:
    template = settings.version.model_dump(mode="json", exclude_none=True)
    named = {"name": settings.name_application(version), "route_prefix": None}
    return {**template, **named, "args": settings.build_arguments(version)}


def _override(entry: Entry, override: Entry) -> Entry:
    """The entry with what `override` says of one deployment; what it does not say stays."""
    deployments = {found["name"]: found for found in entry.get("deployments") or []}
    deployments[override["name"]] = deployments.get(override["name"], {}) | override
    return {**entry, "deployments": list(deployments.values())}


def _find(entries: Iterable[Entry], name: str) -> Entry:
    for entry in entries:
        if entry["name"] == name:
            return entry
    raise ConfigError(f"Serve has no application {name!r}.")


def _find_user_config(entry: Entry, deployment: str) -> Any:
    for found in entry.get("deployments") or []:
        if found["name"] == deployment:
            return found.get("user_config")
    return None
