"""Turns the model of a pool's settings into a local folder that an engine can load.

Does not load the model or judge its quality.
Called by: serving/app.py, serving/deploy.py. Calls: registry.
"""

from pathlib import Path
from typing import TypeVar

from swiftkv.config import home
from swiftkv.errors import CheckpointError
from swiftkv.serving.config import PoolSettings

AnyPool = TypeVar("AnyPool", bound=PoolSettings)

_in_use: list[object] = []
"""Fetched versions: the node's cache evicts none of them while this process lives."""


def resolve_model(settings: AnyPool) -> AnyPool:
    """The same settings with `model` as the absolute path of a local folder and `model_id` filled in.

    A model of the registry is fetched and compared with its manifest; a folder is taken as it is.
    Raises: CheckpointError if a path is no checkpoint folder; RegistryError or its kinds from the registry.
    """
    if _looks_like_path(settings.model):
        folder = Path(settings.model).expanduser().absolute()
        _check_folder(folder)
        name = folder.name
    else:
        from swiftkv.registry.registry import Registry  # obstore is needed only here

        fetched = Registry(settings.store or home() / "registry").fetch(settings.model)
        _in_use.append(fetched)
        folder, name = fetched.path.absolute(), fetched.name
    return settings.model_copy(update={"model": str(folder), "model_id": settings.model_id or name})


def _looks_like_path(model: str) -> bool:
    # A model's name in the registry has no slash; a folder of the same name as a model needs "./".
    return "/" in model or model.startswith(("~", "."))


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no checkpoint folder (it needs config.json and *.safetensors). "
            "Give a folder, or the name of a model in the registry without a slash."
        )
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder}: no *.safetensors file; weights in other formats are not loaded.")
