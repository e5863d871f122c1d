"""The site builds without a warning, from these files alone."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from site_pages import DOCS, ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    for module in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not here; `make docs` installs requirements/docs.txt")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


def test_every_page_and_picture_is_built(site: Path) -> None:
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS)).with_suffix(".html").is_file(), page
    for picture in ("journey.svg", "reports/engine/table.png", "reports/quickstart/loss.png"):
        assert (site / picture).is_file(), picture


def test_what_is_taken_over_from_reports_is_there(site: Path) -> None:
    text = (site / "numbers.html").read_text(encoding="utf-8")
    assert "prompt tokens/s over the teacher's" in text and "--8<--" not in text


def test_docstrings_are_on_the_pages_of_the_api(site: Path) -> None:
    text = (site / "api" / "model.html").read_text(encoding="utf-8")
    assert "SwiftKVForCausalLM" in text and "<strong>Called by:</strong>" in text


def test_a_reader_s_browser_asks_nobody_else(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe)[^>]* src=\"([^\"]*)|<link[^>]* href=\"([^\"]*)", text)
        outside = [address for pair in fetched for address in pair if re.match(r"(?:https?:)?//", address)]
        assert not outside, f"{page.name}: {outside}"
