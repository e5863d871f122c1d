"""The folder of prepared rows, and which of them belong to which step, worker and pass.

Does not make rows (packing.py). Which rows a step takes depends on seed, step and rows per step alone, so that any
number of workers sees the same steps.
Called by: distill/prepare.py (writes), distill/worker.py and distill/loop.py (read).

Shapes: R rows, T tokens of a row, S rows that are read.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from swiftkv.distill.packing import RowBlock

_DTYPES = {"input_ids": "<i4", "position_ids": "<i4", "predicts": "|b1"}
"""Array of the folder -> NumPy's name of its type."""
INFO_FILE = "info.json"


@dataclass(frozen=True)
class PackedRows:
    """Rows in a folder, read as they are needed."""

    input_ids: npt.NDArray[np.int32]
    """[R, T]."""
    position_ids: npt.NDArray[np.int32]
    """[R, T]; starts again at 0 with each document of a row."""
    predicts: npt.NDArray[np.bool_]
    """[R, T]; True where student and teacher are compared."""
    num_positions: npt.NDArray[np.int64]
    """[R]; how many of those a row has."""
    used_frac: float
    """Part of all positions that hold documents."""

    @classmethod
    def open(cls, folder: Path) -> "PackedRows":
        """The rows in a folder of `RowWriter`."""
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _DTYPES}
        info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
        return cls(**arrays, num_positions=np.count_nonzero(arrays["predicts"], axis=1), used_frac=info["used_frac"])

    def __len__(self) -> int:
        return len(self.input_ids)

    def read(self, indices: npt.NDArray[np.int64]) -> RowBlock:
        """Copies of some rows; -1 is a row that only fills up and has no loss. Shapes: [S] -> [S, T] each."""
        predicts = self.predicts[indices] & (indices >= 0)[:, np.newaxis]
        return RowBlock(self.input_ids[indices], self.position_ids[indices], predicts)


class RowWriter:
    """Writes rows into a folder as they come, however many there will be."""

    def __init__(self, folder: Path, row_tokens: int) -> None:
        self.num_rows = 0
        self.num_positions = 0
        self._folder = folder
        self._row_tokens = row_tokens
        self._files: dict[str, BinaryIO] = {name: (folder / f"{name}.npy").open("wb") for name in _DTYPES}
        self._write_headers()

    def write(self, block: RowBlock) -> None:
        """Append rows."""
        for name, file in self._files.items():
            file.write(np.ascontiguousarray(getattr(block, name)).data)
        self.num_rows += len(block.input_ids)
        self.num_positions += int(block.predicts.sum())

    def close(self, info: dict[str, Any]) -> None:
        """Finish the folder; `info`, which has `used_frac`, is written last."""
        self._write_headers()
        for file in self._files.values():
            file.close()
        (self._folder / INFO_FILE).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")

    def _write_headers(self) -> None:
        """NumPy leaves room for the number of rows to grow, so the last header is as long as the first."""
        for name, file in self._files.items():
            file.seek(0)
            shape = (self.num_rows, self._row_tokens)
            header = {"descr": _DTYPES[name], "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]


def choose_rows(step: int, rows_per_step: int, num_rows: int, seed: int) -> npt.NDArray[np.int64]:
    """Row numbers of a step: each epoch is one shuffle of all rows.

    Depends on nothing but its arguments, so that any number of workers sees the same batches.
    """
    first = step * rows_per_step
    positions = np.arange(first, first + rows_per_step)
    chosen = np.empty(rows_per_step, dtype=np.int64)
    for epoch in np.unique(positions // num_rows):
        order = np.random.default_rng((seed, int(epoch))).permutation(num_rows)
        here = positions // num_rows == epoch
        chosen[here] = order[positions[here] % num_rows]
    return chosen


def share_rows(
    chosen: npt.NDArray[np.int64], rank: int, world_size: int, rows_per_pass: int | None
) -> list[npt.NDArray[np.int64]]:
    """A step's row numbers of each pass of this worker; -1 where a pass only fills up.

    Every worker has as many passes of the same size (at most `rows_per_pass`; None: one pass), because all take part
    in each; over all workers every row is there once.
    """
    share = -(-len(chosen) // world_size)
    num_passes = -(-share // (rows_per_pass or share))
    size = -(-share // num_passes)
    rows = np.full(num_passes * size, -1, dtype=np.int64)
    own = chosen[rank::world_size]
    rows[: len(own)] = own
    return list(rows.reshape(num_passes, size))
