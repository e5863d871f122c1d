"""Text into rows: every token in order, an end token after each document, clear errors for bad files."""

import json
from pathlib import Path

import pytest
from fakes import END_ID, write_tokenizer

from swiftkv.errors import DataError
from swiftkv.model.checkpoint import load_tokenizer
from swiftkv.text import build_rows, choose_evenly


@pytest.fixture
def tokenizer(tmp_path: Path) -> object:
    return load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))


def write_lines(path: Path, *lines: object) -> list[Path]:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return [path]


def test_rows_hold_the_documents_end_to_end(tokenizer: object, tmp_path: Path) -> None:
    texts = ["def f():\n    return 1", "é", "x" * 40]
    files = write_lines(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    stream = [token for text in texts for token in [*text.encode(), END_ID]]
    rows = build_rows(tokenizer, files, "text", row_tokens=16)
    assert rows.shape == (len(stream) // 16, 16)
    assert rows.flatten().tolist() == stream[: rows.size]
    assert choose_evenly(rows, 2).tolist() == [rows[0].tolist(), rows[-1].tolist()]
    assert choose_evenly(rows, 99) is rows


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["not json\n"], "a.jsonl:1: not valid JSON"),
        ([{"text": "ok"}, {"body": "x"}], "a.jsonl:2: no column 'text'; there are: body"),
        ([{"text": 3}], "column 'text' holds a int"),
        ([{"text": "short"}], "6 tokens, less than one row of 16"),
        (["[1]\n"], "there are: none: it is a list"),
        ([], "0 tokens"),
    ],
)
def test_bad_text_is_refused_by_place(tokenizer: object, tmp_path: Path, lines: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_rows(tokenizer, write_lines(tmp_path / "a.jsonl", *lines), "text", 16)


def test_a_missing_file_is_named(tokenizer: object, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone.jsonl: no such file"):
        build_rows(tokenizer, [tmp_path / "gone.jsonl"], "text", 16)
