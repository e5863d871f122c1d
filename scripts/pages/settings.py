"""Typed settings as tables: key, type and unit, default, meaning, all read from the classes that check them.

Called by: references.py.
"""

import json
import re
import types
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pages.markdown import build_table, code, escape, make_anchor

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    Decimal: "decimal number",
    str: "text",
    Path: "path",
    Any: "anything",
    type(None): "`null`",
}
_UNITS = {
    r"_tokens_per_s$": "tokens/s",
    r"_bytes_per_s$": "bytes/s",
    r"flops_per_s$": "FLOP/s",
    r"_s_per_token_squared$": "s per token²",
    r"_s_per_(context_)?token$": "s per token",
    r"_s_per_request$": "s per request",
    r"_s_per_sequence$": "s per sequence",
    r"_s$": "s",
    r"_gib$": "GiB",
    r"_bytes$": "bytes",
    r"_tokens$": "tokens",
    r"_frac$": "fraction",
    r"_per_minute$": "per minute",
}
"""What the end of a key says, as `design` has it: units stand in names."""


def build_sections(root: type[BaseModel], level: int = 2, known: set[type[BaseModel]] | None = None) -> str:
    """A section for the class and for every class that its keys hold, each once, in the order of the keys.

    `known`: classes that another section of the same page has; those that are written here are added.
    """
    known = set() if known is None else known
    sections = []
    for settings_class, paths in _find_classes(root).items():
        if settings_class not in known:
            known.add(settings_class)
            sections.append(_build_section(settings_class, paths, level))
    return "\n".join(sections)


def describe_type(annotation: Any) -> str:
    """The type in words; a class of settings is a link to its section."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe_type(arguments[0])
    if origin is Literal:
        return _join_choices([code(_show(value)) for value in arguments])
    if origin in (Union, types.UnionType):
        return _join_choices([describe_type(argument) for argument in arguments])
    if origin in (list, tuple):
        return f"list of {describe_type(arguments[0])}"
    if origin is dict:
        return f"mapping from {describe_type(arguments[0])} to {describe_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{make_anchor(annotation.__name__)})"
    if annotation in _WORDS:
        return _WORDS[annotation]
    return _WORDS.get(origin, code(str(annotation)))


def describe_limits(field: FieldInfo) -> str:
    """The bounds that a value must keep, such as `≥ 1`; empty if there are none."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = []
    for rule in _list_rules(field):
        found += [
            f"{sign} {_show(getattr(rule, name))}"
            for name, sign in signs.items()
            if getattr(rule, name, None) is not None
        ]
        if getattr(rule, "min_length", None):
            found.append("not empty")
        if getattr(rule, "decimal_places", None):
            found.append(f"{rule.decimal_places} decimal places at most")
        if getattr(rule, "pattern", None):
            found.append(f"like {code(str(rule.pattern))}")
    return ", ".join(found)


def describe_default(field: FieldInfo) -> str:
    """What holds where the key is left out."""
    if field.is_required():
        return "**required**"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        given = {name: getattr(default, name) for name in sorted(default.model_fields_set)}
        inner = ", ".join(f"{name}: {_show(value)}" for name, value in given.items())
        return code("{" + inner + "}") if given else "its defaults"
    return code(_show(default))


def describe_meaning(field: FieldInfo) -> str:
    """The key's docstring, or the first words of that of the class that it holds."""
    text = field.description
    if not text:
        held = next((found for found in _find_held(field.annotation)), None)
        text = ((held.__doc__ or "") if held else "").strip().split("\n\n")[0]
    return escape(text)


def find_unit(key: str) -> str:
    """The unit that a key's name ends with; empty if it has none."""
    return next((unit for pattern, unit in _UNITS.items() if re.search(pattern, key)), "")


def _build_section(settings_class: type[BaseModel], paths: list[str], level: int) -> str:
    rows = []
    for name, field in settings_class.model_fields.items():
        notes = [note for note in (describe_limits(field), find_unit(name)) if note]
        kind = describe_type(field.annotation) + (f"<br>{', '.join(notes)}" if notes else "")
        rows.append((code(name), kind, describe_default(field), describe_meaning(field)))
    heading = f"{'#' * level} {settings_class.__name__}\n\n"
    text = escape((settings_class.__doc__ or "").strip().split("\n\n")[0])
    where = f" At {', '.join(code(path) for path in paths)}." if paths else ""
    return f"{heading}{text}{where}\n\n{build_table(('key', 'type', 'default', 'meaning'), rows)}"


def _find_classes(root: type[BaseModel]) -> dict[type[BaseModel], list[str]]:
    """The classes, each with the keys that hold it: `[]` stands for an item of a list, `NAME` for a mapping's key."""
    found: dict[type[BaseModel], list[str]] = {}

    def look(settings_class: type[BaseModel], path: str) -> None:
        paths = found.setdefault(settings_class, [])
        if path:
            paths.append(path)
        for name, field in settings_class.model_fields.items():
            for held in _find_held(field.annotation):
                look(held, f"{path}.{name}{_describe_holder(field.annotation)}".removeprefix("."))

    look(root, "")
    return found


def _find_held(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        if not isinstance(argument, (str, int, float)) and argument is not None:
            yield from _find_held(argument)


def _describe_holder(annotation: Any) -> str:
    origins = {get_origin(annotation), *(get_origin(argument) for argument in get_args(annotation))}
    if list in origins or tuple in origins:
        return "[]"
    return ".NAME" if dict in origins else ""


def _list_rules(field: FieldInfo) -> Iterator[Any]:
    """Of the key, and of what it is where that may also be `null`."""
    yield from field.metadata
    if get_origin(field.annotation) in (Union, types.UnionType):
        for argument in get_args(field.annotation):
            for note in getattr(argument, "__metadata__", ()):
                yield from note.metadata if isinstance(note, FieldInfo) else [note]


def _join_choices(words: list[str]) -> str:
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _show(value: Any) -> str:
    """A value as YAML has it, on one line."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str):
        return value if re.fullmatch(r"[A-Za-z][\w.:/ -]*", value) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, BaseModel):
        return _show(value.model_dump(mode="json", exclude_unset=True))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_show(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_show(item) for item in value) + "]"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value)
