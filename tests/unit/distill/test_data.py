"""Rows come back as they were written, and every worker takes its part of each step."""

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftkv.distill.data import PackedRows, RowWriter, share_rows
from swiftkv.distill.packing import RowBlock


def draw_block(generator: np.random.Generator, num_rows: int) -> RowBlock:
    ids, positions = (generator.integers(0, 1 << 20, (num_rows, 8)).astype(np.int32) for _ in range(2))
    return RowBlock(ids, positions, generator.random((num_rows, 8)) < 0.5)


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    blocks = [draw_block(generator, num_rows) for num_rows in (3, 1, 120)]
    writer = RowWriter(tmp_path, row_tokens=8)
    for block in blocks:
        writer.write(block)
    writer.close({"used_frac": 0.5})
    ids, positions, predicts = map(np.concatenate, zip(*blocks, strict=True))
    rows = PackedRows.open(tmp_path)
    assert (len(rows), rows.used_frac) == (124, 0.5)
    assert (writer.num_rows, writer.num_positions) == (124, predicts.sum())
    assert rows.num_positions.tolist() == [sum(row) for row in predicts.tolist()]
    chosen = np.array([7, 0, 123])
    for read, written in zip(rows.read(chosen), (ids, positions, predicts), strict=True):
        assert read.dtype == written.dtype
        assert read.tolist() == written[chosen].tolist()


def test_a_row_that_only_fills_up_has_no_loss(tmp_path: Path) -> None:
    writer = RowWriter(tmp_path, row_tokens=8)
    writer.write(RowBlock(np.ones((2, 8), np.int32), np.zeros((2, 8), np.int32), np.ones((2, 8), np.bool_)))
    writer.close({"used_frac": 1.0})
    block = PackedRows.open(tmp_path).read(np.array([1, -1]))
    assert block.predicts.tolist() == [[True] * 8, [False] * 8]
    assert block.input_ids.shape == (2, 8)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 12)))
def test_workers_share_a_step_in_equal_passes(num_rows: int, world_size: int, rows_per_pass: int | None) -> None:
    chosen = np.random.default_rng(num_rows).permutation(100)[:num_rows]
    shares = [share_rows(chosen, rank, world_size, rows_per_pass) for rank in range(world_size)]
    sizes = {tuple(len(rows) for rows in share) for share in shares}
    assert len(sizes) == 1  # every worker has the passes of every other
    (size_of_passes,) = sizes
    assert len(set(size_of_passes)) == 1
    assert size_of_passes[0] <= (rows_per_pass or num_rows)
    assert rows_per_pass is not None or size_of_passes == (-(-num_rows // world_size),)
    taken = np.concatenate([rows for share in shares for rows in share])
    assert sorted(taken[taken >= 0].tolist()) == sorted(chosen.tolist())
    assert set(taken[taken < 0].tolist()) <= {-1}
    assert len(taken) < num_rows + world_size * len(size_of_passes) + world_size  # hardly more than there are
