"""Tokenised documents into rows of one length, several in a row, none of which sees another.

That they do not see each other is told by position ids, which start again at 0 with each (model/modeling.py). Does not
tokenise (tokenise.py) or store rows (data.py).
Called by: distill/prepare.py.

Shapes: R rows, T tokens of a row.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from swiftkv.distill.tokenise import Example

_WINDOW_EXAMPLES = 4096
_WINDOW_TOKENS = 1 << 24
"""Examples are placed by falling length within a window, which closes at either limit."""
_OPEN_TOKENS = 1 << 22
"""Of rows that wait for the next window's examples; the fullest leave first."""


class RowBlock(NamedTuple):
    """Some rows; all arrays [R, T]."""

    input_ids: npt.NDArray[np.int32]
    position_ids: npt.NDArray[np.int32]
    predicts: npt.NDArray[np.bool_]


@dataclass
class Counts:
    """What became of the documents."""

    documents: int = 0
    """That were read."""
    tokens: int = 0
    """That went into rows."""
    cut: int = 0
    """Conversations and pairs longer than a row, which lost their end."""
    left_out: int = 0
    """Those whose answers all lie beyond a row's end."""
    without_loss: int = 0
    """Those with no answer at all."""
    refused: int = 0
    """Those that the chat template cannot show."""
    first_problem: str = ""
    """Why, of the first of them."""


def fit_examples(examples: Iterable[Example], row_tokens: int, may_split: bool, counts: Counts) -> Iterator[Example]:
    """Examples of at most a row each, with loss somewhere; what is left out or cut is counted.

    Longer ones are split if they may be (text), else cut off on the right.
    """
    for example in examples:
        if not example.predicts.any():
            counts.refused += bool(example.problem)
            counts.without_loss += not example.problem
            counts.first_problem = counts.first_problem or example.problem
            continue
        length = len(example.input_ids)
        if length > row_tokens and not may_split:
            has_loss = bool(example.predicts[:row_tokens].any())
            counts.cut += has_loss
            counts.left_out += not has_loss
            length = row_tokens if has_loss else 0
        counts.tokens += length
        for first in range(0, length, row_tokens):
            piece = slice(first, first + row_tokens)
            yield Example(example.input_ids[piece], example.predicts[piece])


def pack_examples(
    examples: Iterable[Example], row_tokens: int, fill_token: int, packing: bool = True
) -> Iterator[RowBlock]:
    """Rows of examples of at most `row_tokens`, filled up with `fill_token`, which carries no loss.

    The same examples in the same order give the same rows. Without `packing` each has a row of its own.
    """
    rows = _OpenRows(row_tokens)
    for window in _split_windows(examples):
        if packing:
            # By falling length, each where it leaves least: the short ones fill what the long ones left.
            for example in sorted(window, key=lambda example: -len(example.input_ids)):
                rows.place(example)
            yield from _build_rows(rows.take(_OPEN_TOKENS // row_tokens), row_tokens, fill_token)
        else:
            yield from _build_rows([[example] for example in window], row_tokens, fill_token)
    yield from _build_rows(rows.take(0), row_tokens, fill_token)


@dataclass
class _OpenRows:
    """Rows that still take examples."""

    row_tokens: int
    by_free_tokens: list[tuple[int, int]] = field(default_factory=list)
    """Free tokens and number of each row, sorted."""
    rows: dict[int, list[Example]] = field(default_factory=dict)
    num_started: int = 0

    def place(self, example: Example) -> None:
        """Into the fullest row that has room for it, or a new one."""
        length = len(example.input_ids)
        at = bisect_left(self.by_free_tokens, (length, -1))
        if at < len(self.by_free_tokens):
            free, number = self.by_free_tokens.pop(at)
        else:
            free, number = self.row_tokens, self.num_started
            self.rows[number] = []
            self.num_started += 1
        self.rows[number].append(example)
        insort(self.by_free_tokens, (free - length, number))

    def take(self, num_kept: int) -> list[list[Example]]:
        """The fullest rows, all but so many."""
        num_taken = max(len(self.by_free_tokens) - num_kept, 0)
        taken = [self.rows.pop(number) for _, number in self.by_free_tokens[:num_taken]]
        del self.by_free_tokens[:num_taken]
        return taken


def _split_windows(examples: Iterable[Example]) -> Iterator[list[Example]]:
    window: list[Example] = []
    num_tokens = 0
    for example in examples:
        window.append(example)
        num_tokens += len(example.input_ids)
        if len(window) == _WINDOW_EXAMPLES or num_tokens >= _WINDOW_TOKENS:
            yield window
            window, num_tokens = [], 0
    if window:
        yield window


def _build_rows(rows: list[list[Example]], row_tokens: int, fill_token: int) -> Iterator[RowBlock]:
    """One block, or none without rows."""
    if not rows:
        return
    shape = (len(rows), row_tokens)
    block = RowBlock(np.full(shape, fill_token, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.bool_))
    for index, row in enumerate(rows):
        first = 0
        for example in row:
            here = slice(first, first + len(example.input_ids))
            block.input_ids[index, here] = example.input_ids
            block.position_ids[index, here] = np.arange(len(example.input_ids))
            block.predicts[index, here] = example.predicts
            first = here.stop
        block.position_ids[index, first:] = np.arange(row_tokens - first)
    yield block
