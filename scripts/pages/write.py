"""Writes the pages of docs/ that are made from code: `make references`. With --check it only says which are not right.

Called by: the Makefile, .pre-commit-config.yaml, tests/docs. Calls: the other files of this folder.
"""

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "scripts"))

from pages import api, commands, journey, metrics_page, references, run_books  # noqa: E402

DOCS = REPOSITORY / "docs"
GENERATED_FOLDERS = ("api", "reference")
"""Nothing else lies in these."""


def build_files() -> dict[str, str]:
    """The content of each generated file, by its path below docs/."""
    return {
        "alerts.md": run_books.build_page(),
        "journey.svg": journey.draw(),
        "reference/commands.md": commands.build_page(),
        "reference/metrics.md": metrics_page.build_page(),
        **{f"reference/{name}.md": text for name, text in references.build_pages().items()},
        **{f"api/{name}.md": text for name, text in api.build_pages().items()},
    }


def find_differences() -> list[str]:
    """What is wrong with the files that lie there, a line each."""
    files = build_files()
    found = []
    for path, content in files.items():
        target = DOCS / path
        if not target.is_file():
            found.append(f"docs/{path} is missing")
        elif target.read_text(encoding="utf-8") != content:
            found.append(f"docs/{path} is not what the code makes")
    for folder in GENERATED_FOLDERS:
        for target in sorted((DOCS / folder).rglob("*")):
            if target.is_file() and target.relative_to(DOCS).as_posix() not in files:
                found.append(f"{target.relative_to(REPOSITORY)} is made by no code")
    return found


def write_files() -> list[Path]:
    """Writes all files, removes what no code makes; returns those that changed."""
    files = build_files()
    changed = []
    for path, content in files.items():
        target = DOCS / path
        if not target.is_file() or target.read_text(encoding="utf-8") != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content, encoding="utf-8")
            changed.append(target)
    for folder in GENERATED_FOLDERS:
        for target in sorted((DOCS / folder).rglob("*")):
            if target.is_file() and target.relative_to(DOCS).as_posix() not in files:
                target.unlink()
                changed.append(target)
    return changed


def main(arguments: list[str]) -> int:
    """Exit status: with --check, 1 if a file is not what the code makes."""
    parser = argparse.ArgumentParser(description="Write the generated pages of docs/.")
    parser.add_argument("--check", action="store_true", help="change nothing; say what differs")
    if parser.parse_args(arguments).check:
        differences = find_differences()
        for line in differences:
            print(f"{line}: run `make references`", file=sys.stderr)
        return 1 if differences else 0
    changed = write_files()
    for path in changed:
        print(path.relative_to(REPOSITORY))
    if not changed:
        print("the generated pages of docs/ were up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
