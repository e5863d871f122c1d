"""Rows hold every token of every example once and in order, apart from each other, with hardly any room left."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftkv.distill import packing as packing_module
from swiftkv.distill.packing import Counts, RowBlock, fit_examples, pack_examples
from swiftkv.distill.tokenise import Example

FILL = -1
ROW_TOKENS = 16

Segment = tuple[tuple[int, ...], tuple[bool, ...]]
"""Tokens and loss of what stands between two starts of position ids."""


def build_examples(masks: list[list[bool]]) -> list[Example]:
    """One example per mask, no token of which is in another."""
    starts = np.cumsum([0, *map(len, masks)])
    return [
        Example(np.arange(start, start + len(mask), dtype=np.int32), np.asarray(mask, dtype=bool))
        for start, mask in zip(starts, masks, strict=False)
    ]


def pack(examples: list[Example], may_split: bool, packing: bool = True) -> tuple[RowBlock, Counts]:
    counts = Counts()
    fitted = fit_examples(examples, ROW_TOKENS, may_split, counts)
    blocks = list(pack_examples(fitted, ROW_TOKENS, FILL, packing))
    empty = np.zeros((0, ROW_TOKENS), dtype=np.int32)
    return RowBlock(*map(np.concatenate, zip(*blocks, strict=True))) if blocks else RowBlock(*[empty] * 3), counts


def split_rows(rows: RowBlock) -> list[list[Segment]]:
    """The segments of each row, taken apart by nothing but its position ids; positions are checked to be 0, 1, 2, …"""
    found = []
    for ids, positions, predicts in zip(*rows, strict=True):
        assert positions[0] == 0
        starts = [*np.flatnonzero(positions == 0), len(ids)]
        segments = []
        for start, end in pairwise(starts):
            assert positions[start:end].tolist() == list(range(end - start))
            segments.append((tuple(ids[start:end].tolist()), tuple(predicts[start:end].tolist())))
        found.append(segments)
    return found


def expect_segments(masks: list[list[bool]], may_split: bool) -> list[Segment]:
    """What of each example is kept, said another way: split at every full row, or cut at the first."""
    expected, token = [], 0
    for mask in masks:
        pairs = [(token + t, loss) for t, loss in enumerate(mask)]
        token += len(mask)
        kept = pairs if may_split else pairs[:ROW_TOKENS]
        if any(loss for _, loss in kept):
            pieces = [kept[first : first + ROW_TOKENS] for first in range(0, len(kept), ROW_TOKENS)]
            expected += [tuple(zip(*piece, strict=True)) for piece in pieces]
    return expected


masks_of_documents = st.lists(st.lists(st.booleans(), min_size=0, max_size=40), max_size=30)


@settings(deadline=None, max_examples=200)
@given(masks_of_documents, st.booleans(), st.booleans())
def test_documents_can_be_read_back_from_rows(masks: list[list[bool]], may_split: bool, packing: bool) -> None:
    rows, counts = pack(build_examples(masks), may_split, packing)
    segments = [segment for row in split_rows(rows) for segment in row]
    fill = [segment for segment in segments if FILL in segment[0]]
    assert all(set(ids) == {FILL} and not any(predicts) for ids, predicts in fill)
    expected = expect_segments(masks, may_split)
    assert Counter(segment for segment in segments if segment not in fill) == Counter(expected)
    assert counts.tokens == sum(len(ids) for ids, _ in expected)


@settings(deadline=None, max_examples=50)
@given(masks_of_documents)
def test_without_packing_each_example_has_a_row_in_order(masks: list[list[bool]]) -> None:
    rows, _ = pack(build_examples(masks), may_split=False, packing=False)
    assert [row[0] for row in split_rows(rows)] == expect_segments(masks, may_split=False)


def test_what_is_cut_and_left_out_is_counted() -> None:
    early, late, never = [True] * 3 + [False] * 20, [False] * 20 + [True] * 3, [False] * 5
    rows, counts = pack(build_examples([early, late, never, [True]]), may_split=False)
    assert (counts.cut, counts.left_out, counts.without_loss) == (1, 1, 1)
    assert sorted(ids for row in split_rows(rows) for ids, _ in row if FILL not in ids) == [tuple(range(16)), (51,)]


@pytest.mark.parametrize(
    ("median", "spread", "row_tokens", "may_split"),
    [(150, 1.0, 512, True), (150, 1.0, 512, False), (400, 1.0, 2048, False), (1100, 1.2, 8192, False)],
)
def test_at_least_97_percent_of_positions_are_used(
    median: int, spread: float, row_tokens: int, may_split: bool
) -> None:
    lengths = np.random.default_rng(0).lognormal(np.log(median), spread, 5000).astype(int) + 2
    examples = (Example(np.zeros(n, np.int32), np.ones(n, bool)) for n in lengths)
    counts = Counts()
    fitted = fit_examples(examples, row_tokens, may_split, counts)
    num_rows = sum(len(block.input_ids) for block in pack_examples(fitted, row_tokens, FILL))
    kept = lengths if may_split else np.minimum(lengths, row_tokens)
    assert counts.tokens == kept.sum()
    assert kept.sum() / (num_rows * row_tokens) >= 0.97


def test_windows_lose_nothing_and_fill_each_others_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = [[True] * length for length in [11] * 8 + [5] * 8]
    expected = {frozenset(ids) for row in split_rows(pack(build_examples(masks), False)[0]) for ids, _ in row}
    monkeypatch.setattr(packing_module, "_WINDOW_EXAMPLES", 8)
    rows, _ = pack(build_examples(masks), may_split=False)
    assert len(rows.input_ids) == 8  # the second window's short ones beside the first's long ones
    assert {frozenset(ids) for row in split_rows(rows) for ids, _ in row} == expected
    monkeypatch.setattr(packing_module, "_OPEN_TOKENS", 4 * ROW_TOKENS)
    rows, _ = pack(build_examples(masks), may_split=False)
    assert {frozenset(ids) for row in split_rows(rows) for ids, _ in row if FILL not in ids} == expected
    assert len(rows.input_ids) > 8
