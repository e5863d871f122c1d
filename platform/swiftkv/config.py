"""What settings of every room share: a strict base class, YAML loading, and where local state lives.

Does not hold any room's own settings. Imports neither torch, ray nor vllm, so that a bad recipe is refused
before anything heavy is loaded.
Called by: distill/recipe.py, serving/config.py, registry/manifest.py, cli.
"""

import difflib
import os
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from yaml.parser import ParserError
from yaml.scanner import ScannerError

from swiftkv.errors import ConfigError


class StrictModel(BaseModel):
    """Base of all settings: unknown keys are errors, values cannot change after parsing."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


Settings = TypeVar("Settings", bound=BaseModel)

_IN_PLAIN_WORDS = {
    "int": "should be a whole number",
    "float": "should be a number",
    "bool": "should be true or false",
    "string": "should be text; write it in quotes",
    "list": "should be a list",
    "dict": "should be a mapping",
    "model": "should be a mapping of settings",
}
"""What pydantic (2.13) says in its own terms of a value of another type, by how the name of its error begins."""


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

    Raises: ConfigError naming `source` and the line if it is not YAML, or has a key twice.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        hint = " Indent with spaces, and put texts with characters of YAML's own in quotes."
        if not isinstance(error, ScannerError | ParserError):
            hint = ""
        raise ConfigError(f"{source}: not valid YAML{place}: {error.problem}.{hint}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which PyYAML would take the last without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"{key.value} is there twice; keep one"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return node


def describe_fault(problem: Any) -> str:
    """One of the errors of a pydantic ValidationError, in plain words."""
    message: str = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if re.search("_(type|parsing|parsing_size|from_float)$", problem["type"]):
        return _IN_PLAIN_WORDS.get(problem["type"].partition("_")[0], message)
    return message


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
    return "\n".join(_describe_problem(problem, settings_class) for problem in error.errors(include_url=False))


def _describe_problem(problem: Any, settings_class: type[BaseModel]) -> str:
    """The key, what is wrong there, and what would be right, by what the setting's own text says."""
    location, kind = problem["loc"], problem["type"]
    place = f"  {'.'.join(str(part) for part in location)}: " if location else "  "
    _, field = _find_place(settings_class, location)
    if kind == "extra_forbidden":
        annotation, _ = _find_place(settings_class, location[:-1])
        return f"{place}unknown key.{_describe_keys(str(location[-1]), annotation)}"
    if kind == "missing":
        return f"{place}missing. Add it.{_describe_meaning(field)}"
    is_shown = not isinstance(problem["input"], dict) and (field is None or field.repr)
    given = f" (given: {problem['input']!r})" if is_shown else ""
    return f"{place}{describe_fault(problem)}{given}.{'' if kind == 'value_error' else _describe_meaning(field)}"


def _describe_keys(given: str, annotation: Any) -> str:
    if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return ""
    allowed = sorted(annotation.model_fields)
    nearest = difflib.get_close_matches(given, allowed, n=1)
    return f"{' Nearest: ' + nearest[0] + '.' if nearest else ''} Allowed here: {', '.join(allowed)}."


def _describe_meaning(field: FieldInfo | None) -> str:
    """The first sentence of the setting's own text, which has its unit."""
    if field is None or not field.description:
        return ""
    sentence = re.split(r"(?<=[.])\s", " ".join(field.description.split()))[0]
    return f" Meaning: {sentence.rstrip('.')}."


def _find_place(settings_class: type[BaseModel], location: tuple[int | str, ...]) -> tuple[Any, FieldInfo | None]:
    """What belongs at a place within the settings, as annotated, and the field that it is or is part of."""
    annotation: Any = settings_class
    field = None
    for part in location:
        if typing.get_origin(annotation) in (list, dict):
            annotation = typing.get_args(annotation)[-1]
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel) and part in annotation.model_fields:
            field = annotation.model_fields[str(part)]
            annotation = field.annotation
        else:
            return None, None
        annotation = _unwrap(annotation)
    return annotation, field


def _unwrap(annotation: Any) -> Any:
    """Without `Annotated`, and without `None`."""
    if typing.get_origin(annotation) is Annotated:
        return _unwrap(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return _unwrap(next(each for each in typing.get_args(annotation) if each is not type(None)))
    return annotation
