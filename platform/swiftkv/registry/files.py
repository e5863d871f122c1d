"""The bytes of a version: folder to store while hashing, store to folder while checking, or checking alone.

Every file is read once and in chunks, so memory does not grow with the model. Decides nothing about versions.
Called by: registry/registry.py. Calls: registry/storage.py.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from swiftkv.errors import CheckpointError, IntegrityError
from swiftkv.registry.layout import is_safe_path
from swiftkv.registry.manifest import FileEntry
from swiftkv.registry.storage import CHUNK_BYTES, Storage

OnProgress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


class _ByteCount:
    """Bytes done so far, told to whoever watches."""

    def __init__(self, total_bytes: int, on_progress: OnProgress | None) -> None:
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self._on_progress = on_progress

    def add(self, num_bytes: int) -> None:
        self.done_bytes += num_bytes
        if self._on_progress is not None:
            self._on_progress(self.done_bytes, self.total_bytes)


def find_files(folder: Path) -> dict[str, Path]:
    """The files that publishing `folder` stores: path relative to it -> where its bytes are, sorted by path.

    Links to files are followed, as in a Hugging Face cache; names that begin with a dot are left out (.git,
    .cache, .gitattributes).
    Raises: CheckpointError for a linked folder, a broken link, a socket or the like, a name that not every
    store takes.
    """
    found: dict[str, Path] = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for name in [*links, *names]:
            path = Path(parent, name)
            if name.startswith("."):
                continue
            if not path.is_file():
                raise CheckpointError(
                    f"{path}: not a regular file (a linked folder, a broken link or a device). A checkpoint holds "
                    "files and links to files: copy what it points to, or remove it."
                )
            relative = path.relative_to(folder).as_posix()
            if not is_safe_path(relative):
                raise CheckpointError(
                    f"{path}: file names may hold letters, digits, '.', '_', '-', '+' and '='. Rename the file."
                )
            found[relative] = path
    return dict(sorted(found.items()))


def upload_files(
    storage: Storage, prefix: str, files: Mapping[str, Path], on_progress: OnProgress | None
) -> tuple[FileEntry, ...]:
    """Write every file below `prefix`; what was written, with the hashes of the very bytes that were sent."""
    sizes = {path: source.stat().st_size for path, source in files.items()}
    count = _ByteCount(sum(sizes.values()), on_progress)
    entries = []
    for path, source in files.items():
        digest = hashlib.sha256()
        storage.upload(f"{prefix}/{path}", _read_chunks(source, sizes[path], digest.update, count), sizes[path])
        entries.append(FileEntry(path=path, size_bytes=sizes[path], sha256=digest.hexdigest()))
    return tuple(entries)


def _read_chunks(
    source: Path, size_bytes: int, hash_chunk: Callable[[bytes], None], count: _ByteCount
) -> Iterator[bytes]:
    left = size_bytes
    with source.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            left -= len(chunk)
            hash_chunk(chunk)
            yield chunk
            count.add(len(chunk))
    if left:
        raise CheckpointError(f"{source}: changed while it was published. Publish when nothing writes to it.")


def check_files(
    storage: Storage,
    prefix: str,
    entries: Sequence[FileEntry],
    on_progress: OnProgress | None,
    copy_to: Path | None = None,
) -> None:
    """Read every byte below `prefix` and compare with `entries`; write the files into `copy_to` if given.

    Raises: IntegrityError naming each file that is missing, extra, or of another size or hash.
    """
    found = storage.list_files(prefix)
    problems = [f"{path}: not in the manifest, but found" for path in found.keys() - {e.path for e in entries}]
    for entry in entries:
        if entry.path not in found:
            problems.append(f"{entry.path}: {entry.size_bytes} bytes in the manifest, but missing")
        elif found[entry.path] != entry.size_bytes:
            problems.append(
                f"{entry.path}: {entry.size_bytes} bytes in the manifest, but {found[entry.path]} bytes found"
            )
    # A wrong listing is known without reading gigabytes.
    if not problems:
        count = _ByteCount(sum(entry.size_bytes for entry in entries), on_progress)
        for entry in entries:
            digest = _read_file(storage, prefix, entry, count, copy_to)
            if digest != entry.sha256:
                problems.append(f"{entry.path}: SHA-256 {entry.sha256} in the manifest, but {digest} found")
    if problems:
        raise IntegrityError(
            f"{storage.location}/{prefix}: differs from its manifest:\n  " + "\n  ".join(sorted(problems))
        )


def _read_file(storage: Storage, prefix: str, entry: FileEntry, count: _ByteCount, copy_to: Path | None) -> str:
    digest = hashlib.sha256()
    path = f"{prefix}/{entry.path}" if prefix else entry.path
    target = Path(os.devnull) if copy_to is None else copy_to / entry.path
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        for chunk in storage.stream(path):
            digest.update(chunk)
            file.write(chunk)
            count.add(len(chunk))
    return digest.hexdigest()
