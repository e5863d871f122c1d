"""Links lead somewhere: to pages, to files of the repository, and to headings that are there."""

import re
import sys
from pathlib import Path

import pytest
from site_pages import DOCS, ROOT, SCRIPTS, find_anchors, find_links, list_pages, list_written_pages, read_prose

sys.path.insert(0, str(SCRIPTS))

from pages.hooks import rewrite_links

PAGES = list_pages()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    for text, target in find_links(page):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"[{text}]({target}): no such file"
        assert found.is_relative_to(ROOT), f"[{text}]({target}) leaves the repository"
        if anchor and found.suffix == ".md":
            assert anchor in find_anchors(found), f"[{text}]({target}): no such heading"


@pytest.mark.parametrize("page", list_written_pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|yaml|yml|md|json|txt))`", text):
        places = (ROOT / name, ROOT / "platform" / "swiftkv" / name)
        assert name.startswith((".swiftkv/", "runs/")) or any(place.exists() for place in places), name


def test_every_page_is_in_the_navigation_and_can_be_reached() -> None:
    navigation = re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(navigation) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


@pytest.mark.parametrize(
    ("written", "page", "repo_url", "shown"),
    [
        ("[Serve](serve.md#one)", "index.md", "", "[Serve](serve.md#one)"),
        ("[out](https://example.org/a)", "index.md", "", "[out](https://example.org/a)"),
        ("![p](../reports/engine/table.png)", "serve.md", "", "![p](reports/engine/table.png)"),
        ("![p](../../reports/engine/table.png)", "api/serve.md", "", "![p](../reports/engine/table.png)"),
        ("[jobs/LOG.md](../jobs/LOG.md)", "serve.md", "", "`jobs/LOG.md`"),
        ("[the log](../jobs/LOG.md)", "serve.md", "", "the log (`jobs/LOG.md`)"),
        ("[the log](../jobs/LOG.md#x)", "serve.md", "https://h/r", "[the log](https://h/r/blob/main/jobs/LOG.md#x)"),
        (
            "[recipes](../../jobs/recipes)",
            "reference/a.md",
            "https://h/r/",
            "[recipes](https://h/r/tree/main/jobs/recipes)",
        ),
    ],
)
def test_links_that_leave_the_site_become_what_it_has(written: str, page: str, repo_url: str, shown: str) -> None:
    assert rewrite_links(written, page, repo_url) == shown


# Figures.

SOURCES = (
    "README.md",
    "jobs/LOG.md",
    "reports/**/*.md",
    "reports/**/*.json",
    "deployments/serve/*.yaml",
    "jobs/**/*.yaml",
)
"""Where a figure with a decimal point may come from."""

OF_OTHERS = {
    "2410.03960": "the paper's number",
    "3.4": "a section of the paper",
    "0.95": "a bound of the tables",
    "1.6": "a version of Dynamo's documents",
    "0.18": "ArcticInference's pin of vLLM",
    "0.29": "the pin of vLLM",
    "1.9": "64.5 ms times 30, in the example of sizing",
    "64.5": "computed and tried in the example of sizing",
    "24.2": "computed and tried in the example of sizing",
}
"""Figures that are from elsewhere, and from where."""


def test_no_figure_is_invented() -> None:
    texts = [path.read_text(encoding="utf-8") for source in SOURCES for path in ROOT.glob(source)]
    known = {number for text in texts for number in find_decimals(text)} | set(OF_OTHERS)
    for page in list_written_pages():
        if page.name != "versions.md":
            unknown = [number for number in find_decimals(read_prose(page)) if number not in known]
            assert not unknown, f"{page.name}: {unknown} stand in none of {', '.join(SOURCES)}"


def find_decimals(text: str) -> list[str]:
    """Numbers with a decimal point, as they are written; versions of three parts are none."""
    return re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\.\d|\d)", text)
