"""Every sample of the pages works as far as can be told without running it: commands parse, configs are valid.

Python samples with prompts are run, and must print what they say.
"""

import ast
import doctest
import re
import shlex
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from ray.serve.schema import HTTPOptionsSchema
from site_pages import ROOT, Block, find_blocks, list_pages

from swiftkv.cli.main import app
from swiftkv.config import parse_settings
from swiftkv.distill.recipe import Recipe
from swiftkv.evaluate.gates import Gate
from swiftkv.serving.checks import check_applications, check_endpoint
from swiftkv.serving.config import PoolSettings
from swiftkv.serving.gateway.settings import GatewaySettings
from swiftkv.serving.gateway.tenants import TenantsFile
from swiftkv.serving.policy.settings import PolicySettings
from swiftkv.serving.policy_check import POLICY
from swiftkv.serving.rollout.settings import RolloutSettings

BLOCKS = [block for page in list_pages() for block in find_blocks(page)]
COMMAND = typer.main.get_command(app)
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
FOLDERS = "jobs|deployments|dashboards|examples|scripts|tests|requirements|docs|platform"
OTHERS = {"aws", "curl", "git", "moto_server", "pipx", "pre-commit", "prometheus", "promtool", "ray", "serve", "sudo"}
OTHERS |= {"export", "kill", "mkdir", "sed", "sleep", "source", "wait"}
"""Programs that are not ours, of which only the files that they name are looked at."""
SAVED = {block.file for block in BLOCKS}
"""Files that a page tells its reader to save."""


def of_language(*languages: str) -> list[Any]:
    found = [block for block in BLOCKS if block.language in languages]
    assert found, languages
    return [pytest.param(block, id=block.place) for block in found]


def test_every_block_says_its_language() -> None:
    unknown = [block.place for block in BLOCKS if block.language not in ("bash", "yaml", "python", "promql", "text")]
    assert not unknown


# Shell.


@pytest.mark.parametrize("block", of_language("bash"))
def test_commands_exist_and_take_what_they_are_given(block: Block) -> None:
    for words in split_commands(block.text):
        check_command(words)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_commands_of_indented_lines_exist(page: Path) -> None:
    """The README's form, in which trees and output stand too: lines that begin with our programs are looked at."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^ {4}((?:swiftkv|make|python|serve|ray|prometheus) (?:.*\\\n)*.*)$", text, flags=re.MULTILINE)
    for words in split_commands("\n".join(lines)):
        check_command(words)


def split_commands(text: str) -> Iterator[list[str]]:
    """Words of each command. `swiftkv models list | show NAME` is a list of choices, as the README writes them."""
    for line in textwrap.dedent(text).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for inner in re.findall(r"\$\((swiftkv [^()]*)\)", " ".join(words)):
            yield inner.split()
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if not words:
            continue
        choices = [[]]
        for word in words:
            if word == "|":
                choices.append([])
            else:
                choices[-1].append(word)
        yield choices[0]
        for choice in choices[1:]:
            yield [*choices[0][:2], *choice]


def check_command(words: list[str]) -> None:
    program, *arguments = words
    if program == "sudo":
        program, *arguments = arguments
    if program == "swiftkv":
        check_swiftkv(arguments)
    elif program == "make":
        for word in arguments:
            assert word in TARGETS or re.fullmatch(r"[A-Z]+=.*", word), f"make {word}: no such target"
    elif program.endswith("python"):
        script = arguments[0]
        assert script == "-m" or script in SAVED or (ROOT / script).is_file(), f"{script}: no such file"
    else:
        assert program in {*OTHERS, "apt", "pip", "pytest"}, f"{program}: is that a command?"
    for word in arguments:
        if re.match(rf"(?:{FOLDERS})/", word):
            assert (ROOT / word).exists(), f"{word}: no such file"


def check_swiftkv(arguments: list[str]) -> None:
    """Parses them as the program does, and stops before it does anything."""
    command, name = COMMAND, "swiftkv"
    while hasattr(command, "commands"):
        assert arguments and arguments[0] in command.commands, f"{name}: no command {arguments[:1]}"
        name, arguments = f"{name} {arguments[0]}", arguments[1:]
        command = command.commands[name.split()[-1]]
    try:
        command.make_context(name, list(arguments))
    except Exception as error:
        pytest.fail(f"{name} {shlex.join(arguments)}: {getattr(error, 'message', error)}")


@pytest.mark.parametrize(
    "line",
    [
        "swiftkv serv quickstart",
        "swiftkv serve quickstart --no-such-option",
        "swiftkv serve quickstart --port eight",
        "swiftkv models show",
        "swiftkv models list | shows NAME",
        "make no-such-target",
        "python scripts/no_such_script.py",
        'key="$(swiftkv keys)"',
        "serve deploy deployments/serve/no-such-config.yaml",
        "swiftvk serve quickstart",
    ],
)
def test_what_does_not_exist_is_found(line: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        for words in split_commands(line):
            check_command(words)


# YAML.


@pytest.mark.parametrize("block", of_language("yaml"))
def test_configs_are_valid(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for other in find_blocks(block.page):  # a config names files that the page has saved before
        if other.file:
            other.save(tmp_path)
    kinds = ", ".join(CHECKS)
    assert block.kind in CHECKS, f'title="{block.title}" must be one of {kinds}, or one of them, ": " and a file'
    CHECKS[block.kind](yaml.safe_load(block.text))


def check_part_of_recipe(values: Any) -> None:
    whole = yaml.safe_load((ROOT / "jobs/recipes/quickstart-half-laptop.yaml").read_text())
    for section, given in values.items():
        whole[section] = {**whole.get(section, {}), **given}
    parse_settings(whole, Recipe, "the sample")


def check_serve_config(values: Any) -> None:
    applications = check_applications(values["applications"], "the sample")
    check_endpoint(values, applications, "the sample")


def check_policy_s_settings(values: Any) -> None:
    assert values["policy_function"] == POLICY and set(values) == {"policy_function", "policy_kwargs"}
    costs = {"prefill_s_per_token": 1e-5, "step_s": 0.01, "kv_tokens": 1e5}  # a config takes them from the pair
    parse_settings({"costs": costs} | values["policy_kwargs"]["settings"], PolicySettings, "the sample")


CHECKS: dict[str, Callable[[Any], object]] = {
    "Recipe": lambda values: parse_settings(values, Recipe, "the sample"),
    "Recipe, part": check_part_of_recipe,
    "Serve config": check_serve_config,
    "Endpoint": lambda values: HTTPOptionsSchema.model_validate(values["http_options"]),
    "Gateway args": lambda values: parse_settings(values, GatewaySettings, "the sample"),
    "Pool args": lambda values: parse_settings(values, PoolSettings, "the sample"),
    "Application's policy": check_policy_s_settings,
    "Rollout args": lambda values: parse_settings(values, RolloutSettings, "the sample"),
    "Tenants file": lambda values: parse_settings(values, TenantsFile, "the sample"),
    "Gate": lambda values: parse_settings(values, Gate, "the sample"),
}
"""By the title of the block, or by what stands there before the file as which the reader saves it."""


# Python.


@pytest.mark.parametrize("block", of_language("python"))
def test_python_samples_compile_and_those_with_prompts_print_what_they_say(block: Block) -> None:
    if ">>> " not in block.text:
        ast.parse(block.text)
        return
    test = doctest.DocTestParser().get_doctest(block.text, {}, block.place, str(block.page), block.line)
    assert test.examples
    said: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert results.failed == 0, "".join(said)
