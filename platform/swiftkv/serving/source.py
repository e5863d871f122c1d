"""Turns the model of a pool's settings into a local folder that an engine can load.

Does not load the model or judge its quality.
Called by: serving/app.py, serving/deploy.py. Calls: registry.
"""

from pathlib import Path
from typing import TypeVar

from swiftkv.config import home
from swiftkv.engine.settings import WeightsSource
from swiftkv.errors import CheckpointError, ConfigError
from swiftkv.serving.config import PoolSettings

AnyPool = TypeVar("AnyPool", bound=PoolSettings)

_in_use: list[object] = []
"""Fetched versions: the node's cache evicts none of them while this process lives."""


def resolve_model(settings: AnyPool) -> AnyPool:
    """The same settings with `model` as the absolute path of a local folder and `model_id` filled in.

    A model of the registry is fetched and compared with its manifest, without its tensors if they are to be streamed;
    a folder is taken as it is.
    Raises: CheckpointError if a path is no checkpoint folder; ConfigError if one is to be streamed; RegistryError or
    its kinds from the registry.
    """
    engine = settings.engine
    if _looks_like_path(settings.model):
        # A pool that was resolved before has its folder in `model`, and where to stream from in `engine`.
        if settings.stream and engine.streamed_from is None:
            raise ConfigError(f"model is the folder {settings.model}, and only a published version can be streamed.")
        folder = Path(settings.model).expanduser().absolute()
        _check_folder(folder, has_tensors=engine.streamed_from is None)
        name = folder.name
    else:
        from swiftkv.registry.registry import Registry  # obstore is needed only here

        registry = Registry(settings.store or home() / "registry")
        if settings.stream:
            fetched = registry.fetch_without_weights(settings.model)
            reference = f"{fetched.name}@{fetched.version}"
            engine = engine.model_copy(
                update={"streamed_from": WeightsSource(store=registry.location, reference=reference)}
            )
        else:
            fetched = registry.fetch(settings.model)
        _in_use.append(fetched)
        folder, name = fetched.path.absolute(), fetched.name
    return settings.model_copy(update={"model": str(folder), "model_id": settings.model_id or name, "engine": engine})


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
