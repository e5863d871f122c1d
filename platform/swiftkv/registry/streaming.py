"""Tensors of a version straight from its store: no file is written, and each part is compared with its hash first.

Only parts that hold a wanted tensor are read, a few ahead. Knows the layout of safetensors files, and no torch.
Called by: registry/registry.py. Calls: registry/files.py, registry/metering.py.
Source: the safetensors format: eight bytes of length, a JSON header, then the tensors' bytes.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from swiftkv.errors import IntegrityError
from swiftkv.registry.files import NUM_WORKERS, ReadPart, describe_part, run_in_order
from swiftkv.registry.manifest import FileEntry, Manifest
from swiftkv.registry.metering import metered

INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class RawTensor:
    """A tensor's bytes, and what the file's header says of them."""

    name: str
    entry: dict[str, Any]
    """dtype, shape and data_offsets."""
    data: bytes


def is_weights(path: str) -> bool:
    """Whether a version's file holds tensors that an engine loads."""
    return path.endswith(".safetensors") and "/" not in path


def stream_tensors(manifest: Manifest, read_part: ReadPart, wants: Callable[[str], bool]) -> Iterator[RawTensor]:
    """The tensors that `wants` says yes to, of the files that the index names, or of all where there is no index.

    Raises: IntegrityError naming file and part if bytes differ from the manifest.
    """
    entries = {entry.path: entry for entry in manifest.files}
    with metered("stream"):
        for path in _find_weights(manifest, entries, read_part):
            yield from _stream_file(manifest, entries[path], read_part, wants)


def _find_weights(manifest: Manifest, entries: dict[str, FileEntry], read_part: ReadPart) -> list[str]:
    if INDEX_FILE not in entries:
        return sorted(path for path in entries if is_weights(path))
    index = json.loads(_read_range(manifest, entries[INDEX_FILE], read_part, 0, entries[INDEX_FILE].size_bytes))
    files = sorted(set(index["weight_map"].values()))
    missing = sorted(set(files) - entries.keys())
    if missing:
        raise IntegrityError(f"{INDEX_FILE}: names {', '.join(missing)}, which the version lacks.")
    return files


def _stream_file(
    manifest: Manifest, entry: FileEntry, read_part: ReadPart, wants: Callable[[str], bool]
) -> Iterator[RawTensor]:
    length, header = _read_header(manifest, entry, read_part)
    chosen = sorted(
        (8 + length + about["data_offsets"][0], 8 + length + about["data_offsets"][1], name)
        for name, about in header.items()
        if wants(name)
    )
    size = manifest.part_bytes
    needed = sorted({number for start, end, _ in chosen for number in range(start // size, -(-end // size))})
    held: dict[int, bytes] = {}
    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        arriving = run_in_order(pool, (partial(_read_verified, entry, number, read_part) for number in needed))
        order = iter(needed)
        for start, end, name in chosen:
            numbers = range(start // size, -(-end // size))
            for number in [number for number in held if number < numbers.start]:
                del held[number]
            while any(number not in held for number in numbers):
                held[next(order)] = next(arriving)
            yield RawTensor(name, header[name], _cut(held, size, start, end))


def _read_header(manifest: Manifest, entry: FileEntry, read_part: ReadPart) -> tuple[int, dict[str, Any]]:
    """Length of the header, and what it says of each tensor."""
    length = 0
    if entry.size_bytes >= 8:
        length = int.from_bytes(_read_range(manifest, entry, read_part, 0, 8), "little")
    try:
        if not 0 < length <= entry.size_bytes - 8:
            raise ValueError
        header = json.loads(_read_range(manifest, entry, read_part, 8, 8 + length))
        header.pop("__metadata__", None)
        ends = [about["data_offsets"][1] for about in header.values()]
        if max(ends, default=0) > entry.size_bytes - 8 - length:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise IntegrityError(f"{entry.path}: not a readable safetensors file.") from None
    return length, header


def _read_range(manifest: Manifest, entry: FileEntry, read_part: ReadPart, start: int, end: int) -> bytes:
    size = manifest.part_bytes
    numbers = range(start // size, -(-end // size))
    return _cut({number: _read_verified(entry, number, read_part) for number in numbers}, size, start, end)


def _read_verified(entry: FileEntry, index: int, read_part: ReadPart) -> bytes:
    part = read_part(entry, index)
    found = "nothing" if part is None else hashlib.sha256(part).hexdigest()
    if part is None or found != entry.parts[index]:
        raise IntegrityError(f"{entry.path}: {describe_part(entry, index, found)}")
    return bytes(part)


def _cut(held: dict[int, bytes], size: int, start: int, end: int) -> bytes:
    """Bytes `start` to `end` of a file whose parts are at hand."""
    numbers = range(start // size, -(-end // size))
    pieces = (
        memoryview(held[number])[max(start - number * size, 0) : min(end - number * size, size)] for number in numbers
    )
    return b"".join(pieces)
