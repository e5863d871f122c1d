"""The parts of a lock: requirements/cpu.txt and cuda.txt list first what training needs, then what serving adds, ….

Knows how the parts are marked and nothing of how they are resolved or installed.
Called by: lock.py (writes them), docker/image/install.py (takes those of an image), tests.
"""

import re
from collections.abc import Iterable, Mapping

TITLES = {
    "train": "what distills; all that follows needs it too",
    "serve": "vLLM and what it needs",
    "develop": "tests, lint and evaluation on tasks",
}
_MARK = re.compile(r"^# --- (\w+): .*$", flags=re.MULTILINE)
_NAME = re.compile(r"^([A-Za-z0-9][\w.\-]*)(?:\[[^\]]*\])?==")


def join_parts(lines: Iterable[str], last_part: str, names: Mapping[str, set[str]]) -> str:
    """The text of a lock whose requirements, with their hashes, are `lines`.

    `names`: what each earlier part holds, those before it included; what is in none belongs to `last_part`.
    """
    blocks: dict[str, list[str]] = {part: [] for part in [*names, last_part]}
    part = last_part
    for line in lines:
        if match := _NAME.match(line):
            part = next((each for each, members in names.items() if match[1] in members), last_part)
        blocks[part].append(line)
    texts = [f"# --- {part}: {TITLES[part]} ---\n" + "\n".join(block) + "\n" for part, block in blocks.items()]
    return "\n".join(texts)


def select_parts(lock: str, parts: Iterable[str]) -> str:
    """The requirements of these parts. Raises: KeyError if the lock has no such part."""
    _, *marked = _MARK.split(lock)
    texts = dict(zip(marked[::2], marked[1::2], strict=True))
    return "".join(texts[part] for part in parts)


def leave_out(lines: Iterable[str], names: set[str]) -> list[str]:
    """The lines without these requirements and their hashes."""
    kept, keeps = [], True
    for line in lines:
        if match := _NAME.match(line):
            keeps = match[1] not in names
        if keeps:
            kept.append(line)
    return kept


def list_names(lines: Iterable[str]) -> set[str]:
    """Of all requirements."""
    return {match[1] for match in map(_NAME.match, lines) if match}
