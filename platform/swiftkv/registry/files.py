"""The bytes of a version: a folder into the store's blobs, and blobs into a folder, every part compared with its hash.

A file is cut into parts, each an object named by its own SHA-256. So a file is read once, parts travel side by side,
equal parts of any two versions are stored once, and a transfer that was broken off goes on where it was: parts that are
there already, in the store or in the folder, are not sent again. Memory: a few parts, whatever the file's size.
Decides nothing about versions.
Called by: registry/publishing.py, registry/cache.py, registry/registry.py.
Calls: registry/storage.py, registry/metering.py.
"""

import hashlib
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from swiftkv.errors import CheckpointError, IntegrityError, RegistryError
from swiftkv.registry.layout import blob_path, is_safe_path
from swiftkv.registry.manifest import FileEntry, Manifest
from swiftkv.registry.metering import count_bytes
from swiftkv.registry.storage import Storage

PART_BYTES = 8 * 1024 * 1024
"""Part size of new versions."""

_READ_BYTES = 1024 * 1024
"""Of a local file at a time."""

NUM_WORKERS = 6
_IN_FLIGHT = NUM_WORKERS + 2
"""Parts in memory at a time."""

OnProgress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

ReadPart = Callable[[FileEntry, int], Any]
"""The bytes of a file's part from wherever they come."""

Result = TypeVar("Result")


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
    storage: Storage,
    files: Mapping[str, Path],
    base_paths: Mapping[str, str],
    stores_base: bool,
    on_progress: OnProgress | None,
) -> tuple[FileEntry, ...]:
    """Store every file; what was stored, with the hashes of the very bytes that were sent.

    `base_paths`: path -> file of the base that it is; these are only hashed if `stores_base` is False.
    Raises: CheckpointError if a file changes meanwhile.
    """
    sizes = {path: source.stat().st_size for path, source in files.items()}
    count = _ByteCount(sum(sizes.values()), on_progress)
    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        entries = []
        for path, source in files.items():
            own = storage if stores_base or path not in base_paths else None
            sha256, parts = _upload_file(own, pool, source, sizes[path], count)
            base_path = base_paths.get(path)
            entry = FileEntry(path=path, size_bytes=sizes[path], sha256=sha256, parts=parts, base_path=base_path)
            entries.append(entry)
    return tuple(entries)


def _upload_file(
    storage: Storage | None, pool: ThreadPoolExecutor, source: Path, size_bytes: int, count: "_ByteCount"
) -> tuple[str, tuple[str, ...]]:
    """Hashes of the whole file and of its parts. `storage` None: the file is only hashed."""
    whole = hashlib.sha256()

    def store(part: bytes) -> str:
        digest = hashlib.sha256(part).hexdigest()
        # What has the name has the bytes: no other object is ever written there. A wrong size is damage, mended here.
        if storage is not None and storage.find_size(blob_path(digest)) != len(part):
            storage.write(blob_path(digest), part)
            count_bytes("publish", len(part))
        count.add(len(part))
        return digest

    def read() -> Iterator[Callable[[], str]]:
        left = size_bytes
        with source.open("rb", buffering=0) as file:
            while left and (part := file.read(min(PART_BYTES, left))):
                whole.update(part)
                left -= len(part)
                yield partial(store, part)
            if left or file.read(1):
                raise CheckpointError(f"{source}: changed while it was published. Publish when nothing writes to it.")

    parts = tuple(run_in_order(pool, read()))
    return whole.hexdigest(), parts


def fill_folder(
    folder: Path, manifest: Manifest, read_part: ReadPart, on_progress: OnProgress | None, replace: bool = True
) -> None:
    """Make `folder` hold exactly the version's files: parts that are right stay, all else is written or removed.

    Raises: IntegrityError naming each file whose bytes cannot be had; with `replace` False, each that is not right,
    and nothing is changed.
    """
    entries = {entry.path: entry for entry in manifest.files}
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    problems = {}
    for path in found.keys() - entries.keys():
        problems[path] = "not in the manifest, but found"
        if replace:
            found[path].unlink()
    if replace:
        problems.clear()
    count = _ByteCount(manifest.total_bytes, on_progress)
    tasks = _list_part_tasks(folder, manifest, read_part if replace else None, count, problems)
    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        deque(run_in_order(pool, tasks), maxlen=0)
    _raise_problems(str(folder), problems)


def _list_part_tasks(
    folder: Path, manifest: Manifest, read_part: ReadPart | None, count: "_ByteCount", problems: dict[str, str]
) -> Iterator[Callable[[], None]]:
    for entry in manifest.files:
        path = folder / entry.path
        if read_part is None:
            size_bytes = path.stat().st_size if path.is_file() and not path.is_symlink() else None
            if size_bytes != entry.size_bytes:
                there = "missing" if size_bytes is None else f"{size_bytes} bytes found"
                problems[entry.path] = f"{entry.size_bytes} bytes in the manifest, but {there}"
                continue
        else:
            _make_room(path, entry.size_bytes)
        # Opened by each part anew: a file of a thousand parts may not be open a thousand times.
        for index in range(len(entry.parts)):
            yield partial(_set_part, path, manifest, entry, index, read_part, count, problems)


def _set_part(
    path: Path,
    manifest: Manifest,
    entry: FileEntry,
    index: int,
    read_part: ReadPart | None,
    count: "_ByteCount",
    problems: dict[str, str],
) -> None:
    start, size_bytes = index * manifest.part_bytes, manifest.measure_part(entry, index)
    with path.open("rb" if read_part is None else "r+b", buffering=0) as file:
        if read_part is not None and _is_hole(file.fileno(), start, size_bytes):
            found = "nothing"
        else:
            found = _hash_part(file.fileno(), start, size_bytes)
        if found != entry.parts[index] and read_part is not None:
            part = read_part(entry, index)
            found = "nothing" if part is None else hashlib.sha256(part).hexdigest()
            if found == entry.parts[index]:
                _write_all(file.fileno(), memoryview(part), start)
    if found != entry.parts[index]:
        problems[entry.path] = describe_part(entry, index, found)
    count.add(size_bytes)


def _write_all(descriptor: int, part: memoryview, start: int) -> None:
    # A full disk may take a part of the bytes without an error, and gives the error at the next write.
    while part:
        written = os.pwrite(descriptor, part, start)
        part, start = part[written:], start + written


def _is_hole(descriptor: int, start: int, size_bytes: int) -> bool:
    """Whether a part was never written."""
    try:
        return os.lseek(descriptor, start, os.SEEK_DATA) >= start + size_bytes
    except OSError:  # a hole up to the end
        return True


def _hash_part(descriptor: int, start: int, size_bytes: int) -> str:
    digest = hashlib.sha256()
    for offset in range(start, start + size_bytes, _READ_BYTES):
        digest.update(os.pread(descriptor, min(_READ_BYTES, start + size_bytes - offset), offset))
    return digest.hexdigest()


def check_blobs(storage: Storage, manifest: Manifest, on_progress: OnProgress | None) -> None:
    """Read every byte that the store holds of a version, and compare parts and whole files with the manifest.

    Raises: IntegrityError naming each file that differs.
    """
    problems: dict[str, str] = {}
    entries = [entry for entry in manifest.files if manifest.is_stored(entry)]
    count = _ByteCount(sum(entry.size_bytes for entry in entries), on_progress)
    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        for entry in entries:
            whole = hashlib.sha256()
            reads = (partial(storage.read_buffer, blob_path(part)) for part in entry.parts)
            for index, part in enumerate(run_in_order(pool, reads)):
                if part is not None:
                    count_bytes("verify", memoryview(part).nbytes)
                found = "nothing" if part is None else hashlib.sha256(part).hexdigest()
                if part is not None and found == entry.parts[index]:
                    whole.update(part)
                else:
                    problems[entry.path] = describe_part(entry, index, found)
                count.add(manifest.measure_part(entry, index))
            if entry.path not in problems and whole.hexdigest() != entry.sha256:
                problems[entry.path] = f"SHA-256 {entry.sha256} in the manifest, but {whole.hexdigest()} found"
    _raise_problems(f"{storage.location}: {manifest.name}@{manifest.version}", problems)


def read_at(path: Path, manifest: Manifest, entry: FileEntry, index: int) -> bytes | None:
    """A part from a local file that should hold it; None if there is no such file."""
    try:
        with path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), manifest.measure_part(entry, index), index * manifest.part_bytes)
    except FileNotFoundError:
        return None


def describe_part(entry: FileEntry, index: int, found: str) -> str:
    """What is wrong with a part whose bytes have the hash `found`."""
    return f"part {index + 1} of {len(entry.parts)}: SHA-256 {entry.parts[index]} in the manifest, but {found} found"


def _raise_problems(where: str, problems: Mapping[str, str]) -> None:
    if problems:
        lines = sorted(f"{path}: {problem}" for path, problem in problems.items())
        raise IntegrityError(f"{where}: differs from its manifest:\n  " + "\n  ".join(lines))


def _make_room(path: Path, size_bytes: int) -> None:
    """The file, of that size and with the bytes that it has already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or path.is_dir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    with path.open("ab") as file:
        file.truncate(size_bytes)


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raises: RegistryError if the disk of `folder`, which may not exist yet, has not so much left."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise RegistryError(
            f"{folder}: {needed_bytes / 1e9:.1f} GB are needed and {free_bytes / 1e9:.1f} GB are free. Free some, or "
            "set SWIFTKV_HOME to another disk."
        )


def run_in_order(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """Results in the order of the tasks, of which a few run at a time; the first error ends it all."""
    running: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            running.append(pool.submit(task))
            if len(running) >= _IN_FLIGHT:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()


class _ByteCount:
    """Bytes done so far, told to whoever watches."""

    def __init__(self, total_bytes: int, on_progress: OnProgress | None) -> None:
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._on_progress = on_progress
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self._done_bytes += num_bytes
            if self._on_progress is not None:
                self._on_progress(self._done_bytes, self._total_bytes)
