"""Rows are made once, the same on any cluster, and are there whole or not at all."""

import errno
import json
import os
import pickle
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from fakes import END_ID, write_tokenizer

from swiftkv.bench.byte_tokenizer import CHAT_TEMPLATE
from swiftkv.distill import prepare
from swiftkv.distill.data import PackedRows
from swiftkv.distill.prepare import prepare_rows
from swiftkv.distill.recipe import Recipe
from swiftkv.errors import DataError, TrainingError

pytestmark = pytest.mark.cluster

TEXTS = [f"text {number} " + "x" * (number * 7 % 90) for number in range(60)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    write_tokenizer(tmp_path / "teacher")
    write_lines(tmp_path / "text.jsonl", *({"text": text} for text in TEXTS))
    return build_recipe(tmp_path, {"files": [str(tmp_path / "text.jsonl")]})


def build_recipe(folder: Path, *sources: dict[str, Any], **data: Any) -> Recipe:
    values = {"train": list(sources), "row_tokens": 64} | data
    return Recipe.model_validate({"teacher": str(folder / "teacher"), "data": values, "training": {"steps": 1}})


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_documents(folder: Path) -> list[list[int]]:
    """Tokens between two starts of position ids, without what fills up."""
    rows = PackedRows.open(folder)
    starts = np.flatnonzero(np.asarray(rows.position_ids) == 0)[1:]
    pieces = np.split(np.asarray(rows.input_ids).flatten(), starts)
    used = np.split(np.asarray(rows.predicts).flatten(), starts)
    return [piece.tolist() for piece, predicts in zip(pieces, used, strict=True) if predicts.any()]


def expect_pieces(texts: list[str], row_tokens: int) -> list[list[int]]:
    tokens = [[*text.encode(), END_ID] for text in texts]
    return [ids[first : first + row_tokens] for ids in tokens for first in range(0, len(ids), row_tokens)]


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def wait_for_free_cpus(num_cpus: int) -> None:
    """The workers need them; Ray tells of what was freed a moment later."""
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != num_cpus:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def break_off(*_: Any, **__: Any) -> Any:
    raise AssertionError("was asked to tokenise")


def test_rows_hold_all_documents_and_are_read_again_the_next_time(
    cluster: None, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare_rows(recipe, tmp_path / "cache")
    assert sorted(read_documents(folder)) == sorted(expect_pieces(TEXTS, 64))
    info = json.loads((folder / "info.json").read_text())
    tokens = sum(len(text) + 1 for text in TEXTS)
    num_rows = len(PackedRows.open(folder))
    assert (info["documents"], info["tokens"], info["rows"]) == (60, tokens, num_rows)
    assert info["used_frac"] == tokens / (num_rows * 64) >= 0.97
    wait_for_free_cpus(2)
    said = capsys.readouterr()
    assert re.search(rf"rows: {num_rows} of 64 tokens from 60 documents, \d\d.\d% of them used\n$", said.out)
    assert said.err == ""
    monkeypatch.setattr(prepare, "_tokenise_on_cluster", break_off)
    assert prepare_rows(recipe, tmp_path / "cache") == folder
    assert capsys.readouterr().out == f"rows: {num_rows} of 64 tokens, prepared before ({folder})\n"


def test_rows_do_not_depend_on_how_the_work_was_divided(
    cluster: None, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare_rows(recipe, tmp_path / "whole")
    monkeypatch.setattr(prepare, "_CHARACTERS_PER_TASK", 300)
    monkeypatch.setattr(prepare, "_TASKS_PER_RUN", 3)
    divided = prepare_rows(recipe, tmp_path / "divided")
    assert read_files(whole) == read_files(divided)


def test_sources_of_several_formats_are_mixed_and_counted(
    cluster: None, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [{"prompt": "p" * 5, "response": "r" * 100}, {"prompt": "p" * 70, "response": "r"}]
    answered = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    chats = [{"messages": answered}, {"messages": answered[:1]}]
    files = [str(write_lines(tmp_path / name, *lines)) for name, lines in (("p.jsonl", pairs), ("c.jsonl", chats))]
    mixed = build_recipe(tmp_path, {"files": files[:1], "format": "pair"}, {"files": files[1:], "format": "chat"})
    folder = prepare_rows(mixed, tmp_path / "cache")
    assert sorted(map(len, read_documents(folder))) == [6, 64]
    info = json.loads((folder / "info.json").read_text())
    assert [info[name] for name in ("documents", "cut", "left_out", "without_loss")] == [4, 1, 1, 1]
    said = capsys.readouterr().out
    assert "rows: 1 examples cut, 1 left out: raise data.row_tokens\n" in said
    assert "rows: 1 examples without an answer left out\n" in said


def test_the_folder_follows_everything_the_rows_are_made_of(recipe: Recipe, tmp_path: Path) -> None:
    def find(recipe: Recipe) -> str:
        hashes = [prepare.load_source(source).compute_hash() for source in recipe.data.train]
        return prepare._compute_fingerprint(recipe, hashes)

    source = recipe.data.train[0].model_dump(mode="json")
    moved = shutil.copy(tmp_path / "text.jsonl", tmp_path / "moved.jsonl")
    assert find(recipe) == find(build_recipe(tmp_path, source | {"files": [str(moved)]}))
    found = [
        find(recipe),
        find(build_recipe(tmp_path, source, row_tokens=32)),
        find(build_recipe(tmp_path, source, packing=False)),
        find(build_recipe(tmp_path, source, loss_on="all")),
        find(build_recipe(tmp_path, source | {"max_documents": 3})),
        find(build_recipe(tmp_path, source, source)),
    ]
    (tmp_path / "teacher" / "chat_template.jinja").write_text("{{ messages }}")
    found.append(find(recipe))
    (tmp_path / "text.jsonl").write_text('{"text": "other"}\n')
    found.append(find(recipe))
    assert len(set(found)) == 8


def test_a_preparation_that_breaks_off_leaves_no_rows(
    cluster: None, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = tmp_path / "cache"
    with monkeypatch.context() as broken:
        broken.setattr(prepare.RowWriter, "close", break_off)
        with pytest.raises(AssertionError):
            prepare_rows(recipe, cache)
        broken.setattr(prepare.RowWriter, "write", fill_the_disk)
        with pytest.raises(TrainingError, match="do not fit on its disk .*SWIFTKV_HOME"):
            prepare_rows(recipe, cache)
    assert list(cache.iterdir()) == []
    assert len(PackedRows.open(prepare_rows(recipe, cache)))


def test_a_preparation_that_was_killed_hurts_nobody(
    cluster: None, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What SIGKILL leaves is an unfinished folder; one that is written to now belongs to a run at the same time."""
    cache = tmp_path / "cache"
    old, fresh = cache / ".unfinished-old", cache / ".unfinished-fresh"
    for folder in (old, fresh):
        folder.mkdir(parents=True)
        (folder / "input_ids.npy").write_bytes(b"half")
    two_days_ago = time.time() - 2 * 24 * 3600
    for path in (old / "input_ids.npy", old):
        os.utime(path, (two_days_ago, two_days_ago))
    folder = prepare_rows(recipe, cache)
    assert sorted(cache.iterdir()) == sorted([folder, fresh])


def test_two_preparations_at_once_keep_the_first(
    cluster: None, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows = prepare._write_rows

    def write_while_another_finishes(*arguments: Any) -> Any:
        monkeypatch.setattr(prepare, "_write_rows", write_rows)
        others.append(prepare_rows(recipe, tmp_path / "cache"))
        (others[0] / "first").touch()
        return write_rows(*arguments)

    others: list[Path] = []
    monkeypatch.setattr(prepare, "_write_rows", write_while_another_finishes)
    folder = prepare_rows(recipe, tmp_path / "cache")
    assert others == [folder] == list((tmp_path / "cache").iterdir())
    assert (folder / "first").is_file()


def test_data_without_loss_is_refused(cluster: None, recipe: Recipe, tmp_path: Path) -> None:
    pairs = write_lines(tmp_path / "pairs.jsonl", {"prompt": "p" * 99, "response": "r"})
    masked = build_recipe(tmp_path, {"files": [str(pairs)], "format": "pair"})
    with pytest.raises(DataError, match=r"all masked: of 1 documents none .* \(64\); 1 are longer, 0 have no answer"):
        prepare_rows(masked, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_conversations_that_the_template_refuses_are_left_out_unless_they_are_all(
    cluster: None, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The template refuses what begins with an answer."""
    path = tmp_path / "teacher" / "chat_template.jinja"
    path.write_text("{{ raise_exception('no') if messages[0].role == 'assistant' else '' }}" + CHAT_TEMPLATE)
    answer = {"role": "assistant", "content": "a"}
    good, refused = {"messages": [{"role": "user", "content": "u"}, answer]}, {"messages": [answer]}
    place = r"\S+chats.jsonl, document {}: the tokenizer's chat template refuses it \(no\)"
    for chats, first in (([good, refused, refused], 2), ([refused], 1)):
        file = write_lines(tmp_path / "chats.jsonl", *chats)
        recipe = build_recipe(tmp_path, {"files": [str(file)], "format": "chat"})
        if good in chats:
            assert len(PackedRows.open(prepare_rows(recipe, tmp_path / "cache"))) == 1
            said = capsys.readouterr().out
            assert re.search("rows: 2 conversations left out; the first: " + place.format(first), said)
        else:
            with pytest.raises(DataError, match="all masked: .* " + place.format(first)):
                prepare_rows(recipe, tmp_path / "cache")


def test_errors_in_workers_arrive_as_they_were_raised(
    cluster: None, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"teacher": recipe.teacher, "tokenizer_hash": "x", "kind": "chat", "loss_on": "all"}
    (recipe.teacher / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(DataError, match=r"^\S+/teacher: its tokenizer has no end token"):
        list(prepare._tokenise_on_cluster([pickle.dumps([])], settings))
