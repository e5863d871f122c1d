"""Turns the model of a pool's settings into a local folder that an engine can load.

Does not load the model or judge its quality.
Called by: serving/app.py, serving/deploy.py, serving/checks.py. Calls: registry.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from swiftkv.config import home
from swiftkv.engine.settings import EngineSettings, WeightsSource
from swiftkv.errors import CheckpointError, ConfigError
from swiftkv.serving.config import ModelSettings, PairSettings, PoolSettings

AnyModel = TypeVar("AnyModel", bound=ModelSettings)

_in_use: list[object] = []
"""Fetched versions: the node's cache evicts none of them while this process lives."""


def resolve_model(settings: AnyModel) -> AnyModel:
    """The same settings with `model` as the absolute path of a local folder and `model_id` filled in.

    A model of the registry is fetched and compared with its manifest, without its tensors if they are to be streamed;
    a folder is taken as it is.
    Raises: CheckpointError if a path is no checkpoint folder; ConfigError if one is to be streamed; RegistryError or
    its kinds from the registry.
    """
    source = _list_engines(settings)[0].streamed_from
    if _looks_like_path(settings.model):
        # A pool that was resolved before has its folder in `model`, and where to stream from in `engine`.
        if settings.stream and source is None:
            raise ConfigError(f"model is the folder {settings.model}, and only a published version can be streamed.")
        folder = Path(settings.model).expanduser().absolute()
        _check_folder(folder, has_tensors=source is None)
        name = folder.name
    else:
        registry = _open_registry(settings)
        if settings.stream:
            fetched = registry.fetch_without_weights(settings.model)
            source = WeightsSource(store=registry.location, reference=f"{fetched.name}@{fetched.version}")
        else:
            fetched = registry.fetch(settings.model)
        _in_use.append(fetched)
        folder, name = fetched.path.absolute(), fetched.name
    named = settings.model_copy(update={"model": str(folder), "model_id": settings.model_id or name})
    return _put_source(named, source)


def read_shape(settings: ModelSettings) -> Mapping[str, Any]:
    """What config.json says of the model's sizes; of a published model its manifest says it, so nothing is fetched.

    Raises: as `resolve_model`.
    """
    if _looks_like_path(settings.model):
        folder = Path(settings.model).expanduser().absolute()
        _check_folder(folder, has_tensors=_list_engines(settings)[0].streamed_from is None)
        shape: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return shape
    return _open_registry(settings).load_manifest(settings.model).spec


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


def _open_registry(settings: ModelSettings) -> Any:
    from swiftkv.registry.registry import Registry  # obstore is needed only here

    return Registry(settings.store or home() / "registry")


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
