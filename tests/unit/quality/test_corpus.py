"""The quality table's corpora: what is held out, what is cut, and that they are the same every time."""

import gzip
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoTokenizer

from swiftkv.errors import DataError

Scripts = dict[str, ModuleType]
NAMES = ("wikisql", "spider", "squality", "qmsum", "thealgorithms")


def load_records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]


def load_data(folder: Path, name: str) -> tuple[dict[str, str], list[dict[str, Any]]]:
    texts = (gzip.decompress((folder / name / f"{kind}.jsonl.gz").read_bytes()) for kind in ("contexts", "items"))
    contexts, items = ([json.loads(line) for line in text.splitlines()] for text in texts)
    return {context["context_id"]: context["text"] for context in contexts}, items


@pytest.mark.parametrize("name", NAMES)
def test_every_item_is_on_one_side_or_left_out_for_its_long_answer(
    corpus_folder: Path, data_folder: Path, name: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(corpus_folder / "tokenizer")
    _, items = load_data(data_folder, name)
    kept = [load_records(corpus_folder / name / f"{side}.jsonl") for side in ("train", "heldout")]
    short = [item["response"] for item in items if len(tokenizer(item["response"])["input_ids"]) <= 383]
    assert sorted(record["response"] for side in kept for record in side) == sorted(short)
    assert len(short) < len(items) and all(kept)
    counts = json.loads((corpus_folder / "summary.json").read_text())[name]
    assert (counts["num_train"], counts["num_heldout"]) == tuple(map(len, kept))
    assert counts["num_left_out"] == len(items) - len(short)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_keep_their_end_and_leave_room_for_the_answer(
    corpus_folder: Path, data_folder: Path, name: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(corpus_folder / "tokenizer")
    contexts, items = load_data(data_folder, name)
    whole = {
        (contexts[item["context_id"]] + "\n\n" if item["context_id"] else "") + item["instruction"] + "\n"
        for item in items
    }
    num_cut = 0
    for record in [
        *load_records(corpus_folder / name / "train.jsonl"),
        *load_records(corpus_folder / name / "heldout.jsonl"),
    ]:
        num_tokens, num_response = (len(tokenizer(record[key])["input_ids"]) for key in ("prompt", "response"))
        assert num_tokens + num_response + 1 <= 1024
        if record["prompt"] not in whole:
            num_cut += 1
            assert any(prompt.endswith(record["prompt"]) for prompt in whole)
            assert record["prompt"][0].isspace() and num_tokens + num_response > 1000, "cut at a word, and no more"
    assert (num_cut > 0) == (name not in ("wikisql", "spider"))
    assert json.loads((corpus_folder / "summary.json").read_text())[name]["num_cut_prompts"] == num_cut


def test_long_texts_are_held_out_whole(corpus_folder: Path, data_folder: Path, scripts: Scripts) -> None:
    for corpus in scripts["corpus"].CORPORA:
        sides: dict[str | None, set[bool]] = {}
        for item, record in zip(
            scripts["corpus"].load_items(data_folder, corpus), load_data(data_folder, corpus.name)[1], strict=True
        ):
            if record["context_id"] is not None:
                sides.setdefault(record["context_id"], set()).add(item.heldout)
        mixed = [context for context, side in sides.items() if len(side) == 2]
        assert bool(mixed) == (corpus.name in ("wikisql", "spider"))


def test_the_share_held_out_is_what_it_says(scripts: Scripts) -> None:
    heldout = [scripts["corpus"].is_heldout(f"item-{index}", 0.1) for index in range(10_000)]
    # Six standard deviations of the binomial distribution.
    assert abs(sum(heldout) - 1000) < 6 * 30


def test_the_tokenizer_has_seen_no_held_out_item(scripts: Scripts, data_folder: Path, corpus_folder: Path) -> None:
    trained_on: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        train = scripts["corpus"].train_tokenizer
        patch.setattr(
            scripts["corpus"], "train_tokenizer", lambda items: train(trained_on.append(item) or item for item in items)
        )
        scripts["corpus"].build_corpora(data_folder, data_folder.parent / "again")
    assert trained_on and not any(item.heldout for item in trained_on)
    files = [path for path in corpus_folder.rglob("*") if path.is_file()]
    again = data_folder.parent / "again"
    assert all(path.read_bytes() == (again / path.relative_to(corpus_folder)).read_bytes() for path in files)


def test_the_tokenizer_spells_numbers_and_loses_nothing(corpus_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(corpus_folder / "tokenizer")
    text = ' WHERE year > 1984.5\n\tAND name = "Zoë"  -- ✓'
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([token]) for token in ids if any(c.isdigit() for c in tokenizer.decode([token]))] == [
        *"19845"
    ]
    assert tokenizer.eos_token == "<|end|>" and tokenizer.chat_template is None and len(tokenizer) <= 4096


def test_a_folder_without_a_corpus_is_named(scripts: Scripts, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no items.jsonl.gz.*wikisql/ as --data"):
        scripts["corpus"].build_corpora(tmp_path, tmp_path / "out")
