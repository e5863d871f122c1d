"""Small pieces of Markdown: tables, code, and text that must not be taken for markup.

Called by: the other files of this folder.
"""

import re
from collections.abc import Iterable, Sequence

MADE = "<!-- Made by `make references` from {source}: do not edit. -->"


def build_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells are Markdown already."""
    lines = [_join(header), _join(["---"] * len(header)), *(_join(row) for row in rows)]
    return "\n".join(lines) + "\n"


def code(text: str) -> str:
    """Text in code quotes, in a table or outside."""
    quotes = "``" if "`" in text else "`"
    inner = f" {text} " if "`" in text else text
    return f"{quotes}{inner}{quotes}"


def escape(text: str) -> str:
    """Text of a docstring or help line: what stands in back quotes stays code, and nothing else is taken for markup."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else _escape_plain(part) for part in parts)


def make_anchor(heading: str) -> str:
    """What MkDocs (and most viewers of repositories) make of a heading of letters, digits and spaces."""
    kept = re.sub(r"[^\w\s-]", "", heading).strip().lower()
    return re.sub(r"[-\s]+", "-", kept)


def _escape_plain(text: str) -> str:
    text = text.replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([*\[\]])", r"\\\1", text)


def _join(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
