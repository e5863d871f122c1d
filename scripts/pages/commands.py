"""The reference of the command line: every command of `swiftkv`, its arguments and options, from the program itself.

Called by: write.py. Reads: swiftkv/cli.
"""

import shlex
from collections.abc import Iterator
from typing import Any

import typer

from pages.markdown import MADE, build_table, code, escape
from swiftkv.cli.main import app

_INTRO = """\
# Commands

`swiftkv COMMAND --help` shows the same on a terminal. Exit status: 0, 1 where a gate was missed, 2 for what the user
can mend (one message says what was given, what is allowed and what to change), 130 after Ctrl-C. State (registry,
caches, the running cluster) lies in `$SWIFTKV_HOME`, by default `.swiftkv` of the current folder.
"""


def list_commands() -> dict[str, Any]:
    """Every command that does something, by its words, such as `models show`."""
    return dict(_walk(typer.main.get_command(app), ()))


def build_page() -> str:
    """The page."""
    sections = [_build_section(words, command) for words, command in list_commands().items()]
    return "\n".join([MADE.format(source="platform/swiftkv/cli"), _INTRO, *sections])


def _walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield " ".join(words), command
        return
    for name, found in inner.items():
        yield from _walk(found, (*words, name))


def _build_section(words: str, command: Any) -> str:
    arguments = [found for found in command.params if found.param_type_name == "argument"]
    options = [found for found in command.params if found.param_type_name == "option"]
    usage = " ".join(["swiftkv", words, *map(_show_argument, arguments), *(["[OPTIONS]"] if options else [])])
    paragraphs = [escape(part) for part in (command.help or "").split("\n\n")]
    parts = [f"## swiftkv {words}", f"    {usage}", *paragraphs]
    if arguments:
        rows = [
            (code(_name_argument(found)), _describe_default(found), escape(found.help or "")) for found in arguments
        ]
        parts.append(build_table(("argument", "default", "meaning"), rows).rstrip())
    if options:
        rows = [(_name_option(found), _describe_default(found), escape(found.help or "")) for found in options]
        parts.append(build_table(("option", "default", "meaning"), rows).rstrip())
    return "\n\n".join(parts) + "\n"


def _name_argument(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _show_argument(argument: Any) -> str:
    name = _name_argument(argument)
    return name if argument.required else f"[{name}]"


def _name_option(option: Any) -> str:
    names = ", ".join(code(name) for name in option.opts)
    if option.secondary_opts:
        names += " / " + ", ".join(code(name) for name in option.secondary_opts)
    return names if option.is_flag else f"{names} {code(option.metavar or option.name.upper())}"


def _describe_default(parameter: Any) -> str:
    """As `--help` says it: a text where the command has one, else the value."""
    if parameter.required:
        return "**required**"
    if isinstance(parameter.show_default, str):
        return escape(parameter.show_default)
    default = parameter.default
    if default is None or default is False or callable(default):
        return ""
    return code(shlex.quote(str(default)) if isinstance(default, str) else str(default))
