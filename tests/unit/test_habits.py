"""What surrounds the code keeps to it: hooks, CI, forms, licence, citation and the documentation's lock."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from swiftkv import __version__

ROOT = Path(__file__).resolve().parents[2]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def load(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def read_pins(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements" / lock).read_text(), flags=re.MULTILINE))


# Hooks and CI.


def test_hooks_are_local_and_call_what_make_check_calls() -> None:
    repositories = load(".pre-commit-config.yaml")["repos"]
    assert [entry["repo"] for entry in repositories] == ["local"]
    entries = [hook["entry"] for hook in repositories[0]["hooks"]]
    for hook in repositories[0]["hooks"]:
        assert hook["language"] == "system", hook["id"]
        assert hook["entry"].startswith(".venv/bin/"), hook["id"]
    for tool in ("ruff format", "ruff check", "mypy"):
        assert any(entry.startswith(f".venv/bin/{tool}") for entry in entries), tool
    check = (ROOT / "Makefile").read_text().partition("\ncheck:")[2].partition("\n\n")[0]
    assert re.findall(r"\$\(BIN\)/(\w+)", check) == ["ruff", "ruff", "mypy"]


def test_the_hook_of_generated_pages_looks_at_what_they_are_made_from() -> None:
    hooks = load(".pre-commit-config.yaml")["repos"][0]["hooks"]
    (pattern,) = (hook["files"] for hook in hooks if hook["id"] == "references")
    for path in ("platform/swiftkv/metrics/table.py", "dashboards/rules.py", "scripts/pages/api.py", "docs/alerts.md"):
        assert re.search(pattern, path), path
        assert (ROOT / path).is_file()


def test_ci_calls_targets_of_the_makefile_and_audits_the_locks() -> None:
    workflow = load(".github/workflows/ci.yml")
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    called = {target for command in commands for target in re.findall(r"\bmake ([a-z-]+)", command)}
    assert called <= TARGETS
    assert {"check", "test", "docs", "audit", "release"} <= called
    assert workflow["permissions"] == {"contents": "read"}
    for command in commands:
        assert command.startswith(("make ", "sudo apt-get ")), command


def test_every_target_is_phony_and_says_what_it_does() -> None:
    text = (ROOT / "Makefile").read_text().replace("\\\n", "")
    phony = set(re.search(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)[1].split())
    assert TARGETS - {"define", "endef"} == phony
    for target in phony:
        assert re.search(rf"^{target}:.*## \S", text, flags=re.MULTILINE), target


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda path: path.name
)
def test_forms_of_issues_ask_for_something(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"] and form["labels"]
    kinds = {"input", "textarea", "dropdown", "checkboxes", "markdown"}
    assert {field["type"] for field in form["body"]} <= kinds
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    assert any(field.get("validations", {}).get("required") for field in form["body"])


# Licence and citation.


def test_the_licence_is_what_the_package_says() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and text.count("\n") > 190
    assert PROJECT["license"] == "Apache-2.0" and PROJECT["license-files"] == ["LICENSE"]


def test_the_citation_names_the_paper_and_this_version() -> None:
    citation = load("CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "version"} <= set(citation)
    assert str(citation["version"]) == __version__ and citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    assert {"value": "arXiv:2410.03960", "type": "other"} in paper["identifiers"]
    assert paper["title"].startswith("SwiftKV") and len(paper["authors"]) == 4


# The documentation's lock.


def test_the_documentation_s_lock_agrees_with_the_other_one() -> None:
    ours, others = read_pins("docs.txt"), read_pins("cpu.txt")
    assert {name: ours[name] for name in ours.keys() & others.keys()} == {
        name: others[name] for name in ours.keys() & others.keys()
    }
    for requirement in PROJECT["optional-dependencies"]["docs"]:
        name, _, version = requirement.partition("==")
        assert ours[name] == version, requirement


def test_the_documentation_s_lock_is_hashed_and_names_no_index() -> None:
    text = (ROOT / "requirements/docs.txt").read_text()
    assert not re.findall(r"://|--(?:extra-)?index-url|--find-links|--trusted-host| @ ", text)
    for name in read_pins("docs.txt"):
        assert re.search(rf"^{re.escape(name)}==\S+(?: ; [^\n]*?)? \\\n +--hash=sha256:", text, flags=re.MULTILINE), (
            name
        )
