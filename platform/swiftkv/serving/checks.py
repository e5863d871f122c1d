"""Refuses a Serve config that cannot work, before any replica starts: what is wrong, and the nearest that works.

Looks at the file, the registry, the store of usage records and what a cluster says it has. Settings that disagree
within one pool or pair are refused by their own classes (config.py). Starts and fetches nothing.
Called by: cli/serve.py, serving/deploy.py. Calls: source.py, exposure.py, hardware.py, placement.py, policy_check.py,
gateway/tenants.py, registry/storage.py.
"""

import difflib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swiftkv.cluster import read_tls
from swiftkv.config import StrictModel, parse_settings
from swiftkv.engine.settings import EngineSettings
from swiftkv.errors import CheckpointError, ConfigError, RegistryError
from swiftkv.serving.config import ModelSettings, PairedPool, PairSettings, PoolSettings
from swiftkv.serving.exposure import ADD_GATEWAY, ADD_TENANTS, check_address
from swiftkv.serving.gateway.settings import GatewaySettings
from swiftkv.serving.gateway.tenants import Tenant, load_tenants
from swiftkv.serving.hardware import (
    CPU,
    GPU_BYTES,
    compute_device_weight_bytes,
    compute_kv_cache_bytes,
    compute_kv_token_bytes,
    count_kv_tokens,
)
from swiftkv.serving.placement import Demand, Resources, describe_nodes, find_nearest, fits
from swiftkv.serving.policy_check import check_policy
from swiftkv.serving.rollout.settings import RolloutSettings
from swiftkv.serving.source import list_references, read_shape

SETTINGS: dict[str, type[StrictModel]] = {
    "swiftkv.serving.app:build_app": PoolSettings,
    "swiftkv.serving.app:build_pool_version": PoolSettings,
    "swiftkv.serving.app:build_pair_app": PairSettings,
    "swiftkv.serving.app:build_pair_version": PairSettings,
    "swiftkv.serving.gateway.app:build_gateway_app": GatewaySettings,
    "swiftkv.serving.rollout.app:build_rollout_app": RolloutSettings,
}
"""What the `args` of our applications are, by import path."""

KEYLESS = ("swiftkv.serving.app:build_app", "swiftkv.serving.app:build_pair_app")
"""Those that answer HTTP without asking for a key."""

Applications = dict[str, StrictModel]
"""Settings of those applications of a file that are ours, by their names there."""


@dataclass(frozen=True)
class Pool:
    """One pool of an application."""

    place: str
    """Application, and which of its pools."""
    count_setting: str
    """That says how many replicas it has at least."""
    replicas: int
    engine: EngineSettings
    """With the role that the pool gives it."""
    settings: PoolSettings | PairedPool


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Looks at a Serve config file's content, its models and its stores of usage records included.

    Raises: ConfigError naming `source`, the application, what is wrong and the nearest that works.
    """
    applications = check_applications(config["applications"], source)
    _check_keys(config, source)
    check_endpoint(config, applications, source)
    for name, settings in applications.items():
        if isinstance(settings, PoolSettings | PairSettings):
            check_model(settings, f"{source}: application {name}")
        if isinstance(settings, GatewaySettings) and settings.usage_store is not None:
            check_usage_store(settings.usage_store, f"{source}: application {name}")
    for entry in config["applications"]:
        pair = applications.get(entry["name"])
        if isinstance(pair, PairSettings):
            check_policy(entry.get("autoscaling_policy"), pair, f"{source}: application {entry['name']}")


def check_applications(entries: Sequence[Any], source: str) -> Applications:
    """The settings of our applications. Raises: ConfigError as `check_config`."""
    applications: Applications = {}
    names: list[str] = []
    for entry in entries:
        if not isinstance(entry, dict) or not entry.get("name"):
            raise ConfigError(f"{source}: every application needs a name.")
        if entry["name"] in names:
            raise ConfigError(f"{source}: two applications are named {entry['name']}; give each its own name.")
        names.append(entry["name"])
        _check_ours(str(entry.get("import_path", "")), SETTINGS, f"{source}: application {entry['name']}: import_path")
        if settings_class := SETTINGS.get(entry.get("import_path", "")):
            place = f"{source}: application {entry['name']}"
            applications[entry["name"]] = parse_settings(entry.get("args") or {}, settings_class, place)
    rollouts = {name: found for name, found in applications.items() if isinstance(found, RolloutSettings)}
    for name, rollout in rollouts.items():
        applications |= _check_rollout(rollout, applications, f"{source}: application {name}")
    for name, settings in applications.items():
        if isinstance(settings, GatewaySettings):
            _check_gateway(settings, names, f"{source}: application {name}")
            _check_followed(name, settings, rollouts.values(), f"{source}: application {name}")
        else:
            _check_hardware(list_pools({name: settings}), f"{source}: application {name}")
    return applications


def check_endpoint(config: Mapping[str, Any], applications: Applications, source: str) -> None:
    """Raises: ConfigError for a port that is none, a certificate that cannot be used, or no keys where others reach."""
    options = config.get("http_options") or {}
    host, port = str(options.get("host", "127.0.0.1")), options.get("port", 8000)
    if not isinstance(port, int) or not 1 <= port <= 65535:
        raise ConfigError(f"{source}: http_options.port is {port!r}; give a number from 1 to 65535.")
    read_tls(options, f"{source}: http_options")
    for name, settings in applications.items():
        if isinstance(settings, GatewaySettings) and settings.tenants_file is None:
            check_address(host, f"{source}: {name}", ADD_TENANTS)
    for entry in config["applications"]:
        if entry.get("import_path") in KEYLESS:
            check_address(host, f"{source}: {entry['name']}", ADD_GATEWAY)


def check_model(settings: ModelSettings, place: str) -> None:
    """Raises: ConfigError if the model is not there, or devices cannot hold it and one prompt of the longest."""
    try:
        shape = read_shape(settings)
    except (CheckpointError, RegistryError) as error:
        nearest = difflib.get_close_matches(settings.model, list_references(settings), n=1, cutoff=0.0)
        hint = f" Nearest: {nearest[0]}." if nearest else ""
        raise ConfigError(f"{place}: model is {settings.model}: {error}{hint}") from error
    for pool in list_pools({place: settings}):
        _check_memory(pool, shape)


def check_usage_store(store: str, place: str) -> None:
    """Raises: ConfigError if this machine cannot write to the store. Nothing of the try stays there."""
    from swiftkv.registry.storage import Storage  # obstore and pyarrow are needed only here
    from swiftkv.serving.usage.records import FOLDER

    try:
        Storage(store).check_writable(FOLDER)
    except (ConfigError, RegistryError) as error:
        raise ConfigError(
            f"{place}: usage_store: {str(error).rstrip('.')}. Give a folder or a bucket's URL that may be written "
            "to, or leave usage_store out: then no usage is recorded."
        ) from error


def check_placement(applications: Applications, nodes: Sequence[Resources], source: str) -> None:
    """Raises: ConfigError if the replicas that are there from the start do not fit the nodes."""
    demands = [_build_demand(pool) for pool in list_pools(applications)]
    # A pool that starts at zero needs no place now, but must be able to have one.
    alone = [[_build_demand(pool, replicas=1)] for pool in list_pools(applications) if not pool.replicas]
    for asked in (demands, *alone):
        if not fits(asked, nodes):
            raise ConfigError(
                f"{source}: the pools do not fit the cluster. Asked for: {', '.join(d.describe() for d in asked)}. "
                f"There: {describe_nodes(nodes)}. The nearest that fits: {find_nearest(asked, nodes)}."
            )


def list_pools(applications: Mapping[str, StrictModel]) -> list[Pool]:
    """All pools of the applications."""
    return [pool for name, settings in applications.items() for pool in _split(name, settings)]


def _split(name: str, settings: StrictModel) -> Iterator[Pool]:
    if isinstance(settings, PoolSettings):
        yield Pool(name, "num_replicas", settings.num_replicas, settings.engine, settings)
    elif isinstance(settings, PairSettings):
        for kind, pool in (("prefill", settings.prefill), ("decode", settings.decode)):
            engine = pool.engine.model_copy(update={"role": "prefill"}) if kind == "prefill" else pool.engine
            yield Pool(f"{name}, {kind}", f"{kind}.min_replicas", pool.min_replicas, engine, pool)


def _check_keys(config: Mapping[str, Any], source: str) -> None:
    """Serve takes keys that it does not know, and does nothing with them: a misspelt one would only be missing."""
    from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    places: list[tuple[str, Mapping[str, Any], Any]] = [("", config, ServeDeploySchema)]
    places.append(("http_options.", config.get("http_options") or {}, HTTPOptionsSchema))
    places += [(f"application {each['name']}: ", each, ServeApplicationSchema) for each in config["applications"]]
    for place, values, schema in places:
        for key in values:
            if key not in schema.model_fields:
                allowed = ", ".join(sorted(schema.model_fields))
                nearest = difflib.get_close_matches(str(key), schema.model_fields, n=1, cutoff=0.0)[0]
                raise ConfigError(f"{source}: {place}{key}: unknown key. Nearest: {nearest}. Allowed here: {allowed}.")


def _check_ours(path: str, known: Collection[str], place: str) -> None:
    """Raises: ConfigError for an import path of ours that is none; others' are Serve's to import."""
    if path.startswith("swiftkv.serving.") and path not in known:
        nearest = difflib.get_close_matches(path, known, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{place} is {path}, which is not there. Nearest: {nearest}.")


def _check_gateway(settings: GatewaySettings, names: Sequence[str], place: str) -> None:
    routed = {route.application for model in settings.models.values() for route in model.routes}
    if missing := sorted(routed - set(names)):
        nearest = difflib.get_close_matches(missing[0], names, n=1, cutoff=0.0)
        hint = f" Nearest: {nearest[0]}." if nearest else ""
        raise ConfigError(f"{place}: routes name {', '.join(missing)}, which this file does not have.{hint}")
    try:
        if settings.tenants_file is not None:
            tenants = load_tenants(Path(settings.tenants_file)).values()
            _check_models(settings, {tenant.name: tenant for tenant in tenants}.values())
    except ConfigError as error:
        raise ConfigError(f"{place}: tenants_file: {error}") from None


def _check_models(settings: GatewaySettings, tenants: Iterable[Tenant]) -> None:
    for tenant in tenants:
        if unknown := sorted(set(tenant.models or []) - set(settings.models)):
            nearest = difflib.get_close_matches(unknown[0], settings.models, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"{settings.tenants_file}: tenant {tenant.name}: models name {unknown[0]}, which this gateway does not "
                f"have. Nearest: {nearest}."
            )


def _check_rollout(settings: RolloutSettings, applications: Applications, place: str) -> Applications:
    """The application that it deploys first, by name."""
    gateway = applications.get(settings.gateway)
    if not isinstance(gateway, GatewaySettings) or settings.served_id not in gateway.models:
        raise ConfigError(
            f"{place}: gateway is {settings.gateway}, which is no gateway of this file with a model "
            f"{settings.served_id}; name one, and give it that model without routes."
        )
    if gateway.models[settings.served_id].routes:
        raise ConfigError(
            f"{place}: {settings.gateway} has routes for {settings.served_id}; remove them: the rollout sets them."
        )
    _check_ours(settings.version.import_path, SETTINGS, f"{place}: version.import_path")
    settings_class = SETTINGS.get(settings.version.import_path)
    if settings_class is None:
        return {}
    arguments = settings.build_arguments(settings.alias)
    return {settings.name_application(settings.alias): parse_settings(arguments, settings_class, f"{place}, version")}


def _check_followed(name: str, gateway: GatewaySettings, rollouts: Collection[RolloutSettings], place: str) -> None:
    followed = {rollout.served_id for rollout in rollouts if rollout.gateway == name}
    if missing := sorted(
        model for model, found in gateway.models.items() if not found.routes and model not in followed
    ):
        raise ConfigError(f"{place}: {missing[0]} has no routes, and no rollout of this file sets them; give it some.")


def _check_hardware(pools: Sequence[Pool], place: str) -> None:
    if all(pool.settings.hardware == CPU for pool in pools):
        return
    from ray.util.accelerators import accelerators

    known = [CPU, *(value for name, value in vars(accelerators).items() if not name.startswith("_"))]
    for pool in pools:
        if pool.settings.hardware not in known:
            nearest = difflib.get_close_matches(pool.settings.hardware, known, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"{place}: hardware is {pool.settings.hardware!r}, which Ray has no name for. Nearest: {nearest}."
            )


def _check_memory(pool: Pool, shape: Mapping[str, Any]) -> None:
    engine, hardware = pool.engine, pool.settings.hardware
    kv_bytes = compute_kv_cache_bytes(shape, engine, hardware)
    if kv_bytes is None:
        return
    if kv_bytes <= 0:
        raise ConfigError(
            f"{pool.place}: weights take {compute_device_weight_bytes(shape, engine) / 1e9:.1f} GB of each {hardware}, "
            f"which has {GPU_BYTES[hardware] / 1e9:g} GB, and leave nothing for the KV cache. The nearest that fits: "
            f"{_find_devices(shape, engine, hardware)}."
        )
    tokens = count_kv_tokens(shape, engine, hardware)
    block = engine.block_size or 1  # a whole number of blocks; vLLM's own size may be the kernel's
    if tokens is None or engine.max_model_len is None or _may_have_window(shape):
        return
    if tokens >= math.ceil(engine.max_model_len / block) * block:
        return
    needed = engine.max_model_len * compute_kv_token_bytes(shape, engine) / 2**30
    more = "more devices (engine.tensor_parallel_size)"
    if engine.gpu_memory_utilization is None:
        more = f"kv_cache_gib {math.ceil(100 * needed) / 100:g}"
    raise ConfigError(
        f"{pool.place}: engine.max_model_len is {engine.max_model_len}, and the KV cache holds {int(tokens)} tokens, "
        f"so one such prompt would never run. The nearest that works: {more}, or max_model_len {int(tokens)}."
    )


def _may_have_window(shape: Mapping[str, Any]) -> bool:
    """Whether a prompt may need less KV than it has tokens. A manifest does not say, and only Mistral's have one."""
    window = shape.get("sliding_window", str(shape.get("model_type")).startswith("mistral"))
    return bool(window and shape.get("use_sliding_window", True))


def _find_devices(shape: Mapping[str, Any], engine: EngineSettings, hardware: str) -> str:
    for devices in (2, 4, 8, 16):
        wider = engine.model_copy(update={"tensor_parallel_size": devices})
        if devices > engine.tensor_parallel_size and (compute_kv_cache_bytes(shape, wider, hardware) or 0) > 0:
            return f"engine.tensor_parallel_size {devices}"
    return "GPUs with more memory"


def _build_demand(pool: Pool, replicas: int | None = None) -> Demand:
    hardware = pool.settings.hardware
    return Demand(
        pool=pool.place,
        setting=pool.count_setting,
        replicas=pool.replicas if replicas is None else replicas,
        hardware=hardware,
        num_cpus=pool.settings.num_cpus,
        num_gpus=0 if hardware == CPU else pool.engine.tensor_parallel_size,
    )
