"""The quality table's scripts as modules, and a small data folder of their form."""

import gzip
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[3] / "examples" / "quality"
SCRIPT_NAMES = ("corpus", "muon", "rows", "teacher")
NUM_CONTEXTS = 24
ITEMS_PER_CONTEXT = 5
WORDS = ["river", "stone", "seven", "lamp", "count", "north", "table", "green", "paper", "wheel"]
CONTEXT_WORDS = {"wikisql": 8, "spider": 40, "squality": 700, "qmsum": 400, "thealgorithms": 300}


@pytest.fixture(scope="session")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The scripts, which import each other by their bare names, as they do when one of them is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        hidden = {name: sys.modules.pop(name) for name in SCRIPT_NAMES if name in sys.modules}
        loaded = {name: importlib.import_module(name) for name in SCRIPT_NAMES}
        yield loaded
        for name in SCRIPT_NAMES:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every corpus with NUM_CONTEXTS contexts, the last of them six times as long, and items with no context."""
    folder = tmp_path_factory.mktemp("data")
    random = Random(0)
    for name, num_words in CONTEXT_WORDS.items():
        contexts, items = [], []
        for index in range(NUM_CONTEXTS):
            length = num_words * (6 if index >= NUM_CONTEXTS - 3 else 1)
            contexts.append({"context_id": f"{name}/{index}", "text": build_text(random, length)})
            items += [build_item(random, f"{name}/{index}", number) for number in range(ITEMS_PER_CONTEXT)]
        items.append(build_item(random, None, 0))
        save_jsonl_gz(folder / name / "contexts.jsonl.gz", contexts)
        save_jsonl_gz(folder / name / "items.jsonl.gz", items)
    return folder


@pytest.fixture(scope="session")
def corpus_folder(scripts: dict[str, ModuleType], data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What corpus.py makes of `data_folder`. Tests read it and write nothing there."""
    folder = tmp_path_factory.mktemp("corpus")
    scripts["corpus"].build_corpora(data_folder, folder)
    return folder


def build_text(random: Random, num_words: int) -> str:
    return " ".join(f"{random.choice(WORDS)}{random.randint(0, 99)}" for _ in range(num_words))


def build_item(random: Random, context_id: str | None, number: int) -> dict[str, Any]:
    instruction = build_text(random, 6)
    return {
        "id": f"{context_id}-q{number}",
        "context_id": context_id,
        "instruction": instruction,
        "response": f"SELECT {instruction.split()[number]}" if number < 4 else build_text(random, 200),
    }


def save_jsonl_gz(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
