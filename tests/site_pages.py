"""The pages of the documentation as tests see them: which there are, their headings, links and blocks of code."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SCRIPTS = ROOT / "scripts"
"""To be put on the path of modules for `import pages`, and for the scripts themselves."""

GENERATED = ("alerts.md", "api/", "reference/")
"""Beginnings of the paths below docs/ of pages that are made by code."""


@dataclass(frozen=True)
class Block:
    """A block of code between fences, or of indented lines."""

    page: Path
    line: int
    language: str
    title: str
    text: str
    heading: str = ""
    """The one of second order that it stands below."""

    @property
    def kind(self) -> str:
        """What the title says it is: `Recipe: runs/own/recipe.yaml` is a Recipe, to be saved as that file."""
        return re.sub(r"(?:^|: )[\w./-]+/[\w.-]+$", "", self.title)

    @property
    def file(self) -> str:
        """The path, from the checkout's folder on, as which a reader saves it; empty for what is not to be saved."""
        return self.title.removeprefix(self.kind).removeprefix(": ")

    def save(self, folder: Path) -> None:
        """As the reader does."""
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.text, encoding="utf-8")

    @property
    def place(self) -> str:
        """For the test's id."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def list_pages() -> list[Path]:
    """Every page of the site, and those that lie elsewhere: the README and the like."""
    others = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docker/README.md")]
    others += sorted((ROOT / "deployments").rglob("*.md"))
    return [*sorted(DOCS.rglob("*.md")), *others]


def list_written_pages() -> list[Path]:
    """Those of the site that people write."""
    pages = sorted(DOCS.rglob("*.md"))
    return [page for page in pages if not page.relative_to(DOCS).as_posix().startswith(GENERATED)]


def find_blocks(page: Path) -> Iterator[Block]:
    """The page's blocks between fences."""
    fence, start, lines, heading = None, 0, [], ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if fence is None and (match := re.match(r"^(```+)(\w*)(.*)$", line)):
            fence, start, lines = match, number, []
        elif fence is not None and line.strip() == fence[1]:
            title = re.search(r'title="([^"]*)"', fence[3])
            yield Block(page, start, fence[2], title[1] if title else "", "\n".join(lines) + "\n", heading)
            fence = None
        elif fence is not None:
            lines.append(line)
        elif line.startswith("## "):
            heading = line.removeprefix("## ")
    assert fence is None, f"{page}:{start}: the block does not end"


def read_prose(page: Path) -> str:
    """The page without code: neither blocks nor what stands in back quotes. Lines keep their numbers."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(?: {4}|\t)\S.*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`", lambda match: "x" * len(match[0]), text)


def find_links(page: Path) -> list[tuple[str, str]]:
    """Text and target of each link and picture outside code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\[([^\]\[]*)\]\(([^)\s]+)\)", text)


def find_anchors(page: Path) -> set[str]:
    """Anchors of the page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE):
        anchor = make_anchor(re.sub(r"[`*]", "", heading))
        number = 0
        while anchor in found:
            number += 1
            anchor = f"{make_anchor(heading)}_{number}"
        found.add(anchor)
    return found


def make_anchor(heading: str) -> str:
    """As Python-Markdown's table of contents has it."""
    kept = re.sub(r"[^\w\s-]", "", heading).strip().lower()
    return re.sub(r"[-\s]+", "-", kept)
