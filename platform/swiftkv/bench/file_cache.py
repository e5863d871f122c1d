"""How many bytes of a checkpoint's files lie in memory, and how many an engine has a use for.

What was read of files that were dropped from memory before: an upper bound, since the kernel counts whole pages and
reads ahead for all who do not ask it otherwise (per run of neighbouring bytes, up to the device's `read_ahead_kb`).
Linux only; file systems that live in memory drop nothing. Reads headers, never tensors.
Called by: bench/engine.py, tests. Calls: engine/weights.py.
"""

import ctypes
import json
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from swiftkv.engine.weights import list_tensor_files, list_tensors, place_tensor
from swiftkv.spec import SwiftKVSpec

_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Run:
    """Neighbouring bytes of one file: from `start` up to `end`, which is not among them."""

    file: Path
    start: int
    end: int


def drop_from_memory(files: Iterable[Path]) -> None:
    """Write files to their disk and drop their pages from memory; pages that a process maps stay."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def count_resident_bytes(files: Iterable[Path]) -> int:
    """Bytes of the files that lie in memory, whoever read them.

    Raises: OSError if the kernel does not tell.
    """
    return sum(_count_resident_bytes(file) for file in files)


def list_wanted_runs(folder: Path, prefill_only: bool) -> list[Run]:
    """What an engine needs of the checkpoint in `folder`, as runs of bytes that do not touch each other."""
    spec = SwiftKVSpec.from_hf_config(json.loads((folder / "config.json").read_text()))
    runs: list[Run] = []
    for file in list_tensor_files(folder):
        for name, start, end in sorted(list_tensors(file), key=lambda entry: entry[1]):
            if not place_tensor(name, spec, prefill_only):
                continue
            if runs and runs[-1].file == file and runs[-1].end == start:
                start = runs.pop().start
            runs.append(Run(file, start, end))
    return runs


def _count_resident_bytes(file: Path) -> int:
    size = file.stat().st_size
    if not size:
        return 0
    resident = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = np.frombuffer(mapped, dtype=np.uint8)  # the only way to a read-only mapping's address
        address = view.ctypes.data
        del view
        failed = _LIBC.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_void_p(resident.ctypes.data))
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(file))
    resident &= 1
    beyond_end = resident.size * mmap.PAGESIZE - size
    return int(resident.sum()) * mmap.PAGESIZE - int(resident[-1]) * beyond_end
