"""Finds the model of a pool's settings: a version of the registry, once and for all replicas, or a folder.

Does not load the model, judge its quality or fetch it (serving/fetching.py does, on each node).
Called by: serving/app.py, serving/deploy.py, serving/checks.py, serving/pools.py. Calls: registry.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from swiftkv.config import home
from swiftkv.engine.settings import EngineSettings, WeightsSource
from swiftkv.errors import CheckpointError, ConfigError
from swiftkv.serving.config import ModelSettings, PairSettings, PoolSettings, PublishedVersion

AnyModel = TypeVar("AnyModel", bound=ModelSettings)


def resolve_model(settings: AnyModel) -> AnyModel:
    """The same settings with `model` as the absolute path of a folder, and `model_id` and `published` filled in.

    A model of the registry is looked up, and nothing of it is fetched: the path is where a node like this one has it
    once it was. A folder is taken as it is. What was resolved before stays the same version.
    Raises: CheckpointError if a path is no checkpoint folder; ConfigError if one is to be streamed; RegistryError or
    its kinds from the registry.
    """
    source = _list_engines(settings)[0].streamed_from
    published = settings.published
    if published is None and _looks_like_path(settings.model):
        if settings.stream:
            raise ConfigError(f"model is the folder {settings.model}, and only a published version can be streamed.")
        folder = Path(settings.model).expanduser().absolute()
        _check_folder(folder, has_tensors=source is None)
        name = folder.name
    else:
        from swiftkv.registry.cache import locate_copy

        published = published or _find_version(settings)
        if settings.stream:
            source = WeightsSource(store=published.store, reference=published.reference)
        folder = locate_copy(published.digest, with_weights=not settings.stream)
        name = published.reference.partition("@")[0]
    found = {"model": str(folder), "model_id": settings.model_id or name, "published": published}
    return _put_source(settings.model_copy(update=found), source)


def read_shape(settings: ModelSettings) -> Mapping[str, Any]:
    """What config.json says of the model's sizes; of a published model its manifest says it, so nothing is fetched.

    Raises: as `resolve_model`.
    """
    if settings.published is None and _looks_like_path(settings.model):
        folder = Path(settings.model).expanduser().absolute()
        _check_folder(folder, has_tensors=_list_engines(settings)[0].streamed_from is None)
        shape: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return shape
    reference = settings.published.reference if settings.published else settings.model
    return _open_registry(settings).load_manifest(reference).spec


def list_references(settings: ModelSettings) -> list[str]:
    """What `model` could be instead of a wrong name: the model's versions and aliases, else the models there are."""
    if _looks_like_path(settings.model):
        return []
    registry = _open_registry(settings)
    name = settings.model.partition("@")[0]
    models = registry.list_models()
    if name not in models:
        return models
    return [f"{name}@{label}" for label in [*registry.list_aliases(name), *registry.list_versions(name)]]


def _find_version(settings: ModelSettings) -> PublishedVersion:
    registry = _open_registry(settings)
    manifest = registry.load_manifest(settings.model)
    return PublishedVersion(
        store=registry.location,
        reference=f"{manifest.name}@{manifest.version}",
        digest=manifest.digest,
        needs_base=any(not manifest.is_stored(entry) for entry in manifest.files),
    )


def _open_registry(settings: ModelSettings) -> Any:
    from swiftkv.registry.registry import Registry  # obstore is needed only here

    if settings.published is not None:
        return Registry(settings.published.store)
    store = settings.store or str(home() / "registry")
    # Other processes open it too, whose working folder is another.
    return Registry(store if "://" in store else Path(store).expanduser().absolute())


def _list_engines(settings: ModelSettings) -> list[EngineSettings]:
    if isinstance(settings, PairSettings):
        return [settings.prefill.engine, settings.decode.engine]
    assert isinstance(settings, PoolSettings)
    return [settings.engine]


def _put_source(settings: AnyModel, source: WeightsSource | None) -> AnyModel:
    def put(part: Any) -> Any:
        return part.model_copy(update={"engine": part.engine.model_copy(update={"streamed_from": source})})

    if isinstance(settings, PairSettings):
        changes = {"prefill": put(settings.prefill), "decode": put(settings.decode)}
    else:
        changes = {"engine": put(settings).engine}
    return settings.model_copy(update=changes)


def _looks_like_path(model: str) -> bool:
    # A model's name in the registry has no slash; a folder of the same name as a model needs "./".
    return "/" in model or model.startswith(("~", "."))


def _check_folder(folder: Path, has_tensors: bool) -> None:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no checkpoint folder (it needs config.json and *.safetensors). "
            "Give a folder, or the name of a model in the registry without a slash."
        )
    if has_tensors and not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder}: no *.safetensors file; weights in other formats are not loaded.")
