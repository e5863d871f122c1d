"""What settings of every room share: a strict base class, YAML loading, and where local state lives.

Does not hold any room's own settings. Imports neither torch, ray nor vllm, so that a bad recipe is refused
before anything heavy is loaded.
Called by: distill/recipe.py, serving/config.py, registry/manifest.py, cli.
"""

import os
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from swiftkv.errors import ConfigError


class StrictModel(BaseModel):
    """Base of all settings: unknown keys are errors, values cannot change after parsing."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


Settings = TypeVar("Settings", bound=BaseModel)


def parse_settings(values: Any, settings_class: type[Settings], source: str) -> Settings:
    """Values as an instance of `settings_class`.

    Raises: ConfigError naming `source`, each wrong key, the value given and what is allowed.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected a mapping of settings, got {type(values).__name__}.")
    try:
        return settings_class.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}:\n" + _describe(error, settings_class)) from None


def load_yaml(path: Path, settings_class: type[Settings]) -> Settings:
    """The YAML file at `path` as an instance of `settings_class`.

    Raises: ConfigError if the file is missing, is not YAML, or holds an unknown key or a wrong value.
    """
    return parse_settings(read_yaml(path), settings_class, str(path))


def read_yaml(path: Path) -> Any:
    """The values in the YAML file at `path`.

    Raises: ConfigError if the file is missing or is not YAML.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. Give the path of a YAML file.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8. Give the path of a YAML file.") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """The values in YAML text.

    Raises: ConfigError naming `source` if it is not YAML.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None


def home() -> Path:
    """Folder of local state (registry, runs, caches, the running cluster): $SWIFTKV_HOME or ./.swiftkv."""
    return Path(os.environ.get("SWIFTKV_HOME", ".swiftkv")).absolute()


def keep_caches_at_home() -> None:
    """Compiled kernels go where `make clean` finds them, and nobody is told what runs here.

    For this process and those it starts; what the user has set stays.
    """
    os.environ.setdefault("VLLM_CACHE_ROOT", str(home() / "cache" / "vllm"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home() / "cache" / "inductor"))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def _describe(error: ValidationError, settings_class: type[BaseModel]) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"]) or "(top level)"
        if problem["type"] == "extra_forbidden":
            allowed = ", ".join(_allowed_keys(settings_class, problem["loc"][:-1]))
            lines.append(f"  {key}: unknown key. Allowed here: {allowed}.")
        elif problem["type"] == "missing":
            lines.append(f"  {key}: missing. Add it.")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = "" if isinstance(problem["input"], dict) else f" (given: {problem['input']!r})"
            lines.append(f"  {key}: {message}{given}.")
    return "\n".join(lines)


def _allowed_keys(settings_class: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    fields = settings_class.model_fields
    for part in location:
        nested = fields[part].annotation if isinstance(part, str) and part in fields else None
        if not (isinstance(nested, type) and issubclass(nested, BaseModel)):
            return ["see the documentation of the enclosing key"]
        fields = nested.model_fields
    return sorted(fields)
