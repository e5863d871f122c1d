"""JSONL text files into rows of packed tokens. Does not order, mask or score them.

Called by: distill/loop.py (training rows), evaluate/compare.py (held-out rows).
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swiftkv.errors import DataError

Rows = npt.NDArray[np.int32]
"""Packed tokens, [rows, tokens]."""

_DOCUMENTS_PER_BATCH = 512


def build_rows(tokenizer: Any, files: list[Path], text_column: str, row_tokens: int) -> Rows:
    """All documents tokenised and packed end to end, an end token after each; the last partial row is dropped.

    Raises: DataError if a file is missing or malformed, or holds too little text for one row.
    """
    end_token = tokenizer.eos_token_id
    if end_token is None:
        raise DataError("The tokenizer has no end token, which separates documents. Set eos_token in its folder.")
    documents = [
        np.asarray([*ids, end_token], dtype=np.int32)
        for batch in _batched(read_texts(files, text_column), _DOCUMENTS_PER_BATCH)
        # Not verbose: a document longer than the model's context is nothing to warn of, for rows are not.
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
    ]
    tokens = np.concatenate(documents) if documents else np.empty(0, dtype=np.int32)
    num_rows = len(tokens) // row_tokens
    if num_rows == 0:
        raise DataError(
            f"{', '.join(map(str, files))}: {len(tokens)} tokens, less than one row of {row_tokens}. "
            "Give more text, or shorter rows."
        )
    return tokens[: num_rows * row_tokens].reshape(num_rows, row_tokens)


def choose_evenly(rows: Rows, max_rows: int) -> Rows:
    """At most `max_rows` of the rows, spread over all of them."""
    if len(rows) <= max_rows:
        return rows
    return rows[np.linspace(0, len(rows) - 1, max_rows).round().astype(int)]


def read_texts(files: list[Path], text_column: str) -> Iterator[str]:
    """The text of every JSONL record.

    Raises: DataError naming file, line and the columns there are.
    """
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: no such file. Check the data files given.")
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                yield _read_text(line, text_column, f"{file}:{number}")


def _read_text(line: str, text_column: str, place: str) -> str:
    try:
        record = json.loads(line)
        text = record[text_column]
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON ({error}). Give one JSON object per line.") from None
    except (KeyError, TypeError):
        columns = ", ".join(record) if isinstance(record, dict) else f"none: it is a {type(record).__name__}"
        raise DataError(f"{place}: no column {text_column!r}; there are: {columns}. Set text_column.") from None
    if not isinstance(text, str):
        raise DataError(f"{place}: column {text_column!r} holds a {type(text).__name__}; give text.")
    return text


def _batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
