"""The node's copies of versions, shared by all processes of the node, within a size.

    cache/models/<digest>            a whole version; its path is the same on every node
    cache/models/<digest>-light      a version without its weights; two versions never share a path
    cache/models/<digest>.partial    one that is being downloaded, or was when its process died: the next goes on
    cache/models/<digest>.json       the manifest of a copy: the node can verify it without the store
    cache/models/<digest>.lock       held while downloading, so that one process does it and the others wait
    cache/models/<digest>.used       held, shared, by whoever uses the copy; its time is that of the last use

Locks are the kernel's: they end with their holder. Every call compares every byte with the manifest.
Called by: registry/registry.py. Calls: registry/files.py.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from swiftkv.config import home
from swiftkv.errors import ConfigError, IntegrityError, RegistryError
from swiftkv.registry.files import OnProgress, ReadPart, fill_folder, read_at, require_space
from swiftkv.registry.manifest import FileEntry, Manifest, parse_manifest

LIMIT_VARIABLE = "SWIFTKV_CACHE_GB"


@dataclass
class CachedCopy:
    """A verified copy, which is not evicted while this object lives."""

    path: Path
    _use: BinaryIO

    def release(self) -> None:
        """Allow the copy to be evicted."""
        self._use.close()


def locate_copy(digest: str, with_weights: bool = True) -> Path:
    """Where this node has its copy of the version of that digest, or would have it."""
    return home() / "cache" / "models" / (digest if with_weights else f"{digest}-light")


def keep_manifest(copy: Path, manifest: Manifest) -> None:
    """Put a whole version's manifest beside the copy. On a full disk it is left out: the copy is as good without."""
    target, content = copy.with_suffix(".json"), manifest.to_json()
    with contextlib.suppress(OSError):
        if not target.is_file() or target.read_bytes() != content:
            whole = target.with_suffix(f".json-{os.getpid()}")
            whole.write_bytes(content)
            whole.rename(target)


def read_kept_manifest(copy: Path, name: str, version: str, digest: str) -> Manifest | None:
    """What `keep_manifest` put there; None if it is not there, damaged, or another version's."""
    try:
        manifest = parse_manifest(copy.with_suffix(".json").read_bytes(), name, version)
    except (OSError, RegistryError):
        return None
    return manifest if manifest.digest == digest else None


def fetch_into_cache(path: Path, manifest: Manifest, read_part: ReadPart, on_progress: OnProgress | None) -> CachedCopy:
    """The verified copy at `path`; a copy that is there is verified again, and replaced if it was damaged.

    Raises: IntegrityError if bytes differ from the manifest and no right ones can be had; RegistryError if the disk or
    the cache's size does not allow it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    use = _take_use(path)
    try:
        if not _is_intact(path, manifest, on_progress):
            with _locked(path.with_suffix(".lock")):
                # Who waited here finds the copy that the one before it made.
                if not _is_intact(path, manifest, None):
                    _download(path, manifest, read_part, on_progress)
    except BaseException:
        use.close()
        raise
    return CachedCopy(path, use)


def _is_intact(path: Path, manifest: Manifest, on_progress: OnProgress | None) -> bool:
    if not path.is_dir():
        return False
    try:
        fill_folder(path, manifest, lambda *_: None, on_progress, replace=False)
    except (IntegrityError, FileNotFoundError):
        return False
    return True


def _download(path: Path, manifest: Manifest, read_part: ReadPart, on_progress: OnProgress | None) -> None:
    partial = path.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    there = sum(file.stat().st_blocks * 512 for file in partial.rglob("*") if file.is_file())
    _make_room(path, manifest.total_bytes, there)
    require_space(path, manifest.total_bytes - there)

    def read(entry: FileEntry, index: int) -> object:
        # A damaged copy is not mended in place, because an engine may be reading it; what is right of it is taken over.
        part = read_at(path / entry.path, manifest, entry, index)
        if part is not None and hashlib.sha256(part).hexdigest() == entry.parts[index]:
            return part
        return read_part(entry, index)

    fill_folder(partial, manifest, read, on_progress)
    if path.exists():
        damaged = path.with_suffix(".damaged")
        shutil.rmtree(damaged, ignore_errors=True)
        path.rename(damaged)
        partial.rename(path)
        shutil.rmtree(damaged, ignore_errors=True)
    else:
        partial.rename(path)


def _make_room(path: Path, needed_bytes: int, there_bytes: int) -> None:
    """Evict the copies that were not used for longest, but for those in use, until `path` fits cache and disk.

    `there_bytes` of what is needed are on the disk already.
    """
    limit = find_limit(path.parent)
    if needed_bytes > limit:
        raise RegistryError(
            f"The version has {needed_bytes / 1e9:.1f} GB, and the cache holds {limit / 1e9:.1f}. Set {LIMIT_VARIABLE}."
        )
    others = {
        folder: _measure(folder) for folder in path.parent.iterdir() if folder.is_dir() and folder.stem != path.name
    }
    total = needed_bytes + sum(others.values())
    limit = min(limit, sum(others.values()) + there_bytes + shutil.disk_usage(path.parent).free)
    for folder in sorted(others, key=lambda folder: _find_last_use(folder)):
        if total <= limit:
            return
        if _evict(folder):
            total -= others[folder]


def _evict(folder: Path) -> bool:
    copy = folder.with_suffix("")
    lock = copy.with_suffix(".lock") if folder.suffix == ".partial" else copy.with_suffix(".used")
    with lock.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not _is_the_file(file, lock):
            return False  # another process evicted it, and somebody may use a new one
        shutil.rmtree(folder, ignore_errors=True)
        if folder == copy:
            copy.with_suffix(".json").unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
    return True


def find_limit(folder: Path) -> int:
    """Bytes that the cache may hold: $SWIFTKV_CACHE_GB, or half of the disk."""
    value = os.environ.get(LIMIT_VARIABLE)
    if value is None:
        return shutil.disk_usage(folder).total // 2
    try:
        limit = float(value)
    except ValueError:
        limit = -1.0
    if not limit > 0:
        raise ConfigError(
            f"{LIMIT_VARIABLE}={value!r}: give the most gigabytes that copies of models may take, such as 200."
        )
    return int(limit * 1e9)


def _measure(folder: Path) -> int:
    total = 0
    with contextlib.suppress(FileNotFoundError):  # evicted, or put in place, meanwhile
        for file in folder.rglob("*"):
            total += 0 if file.is_dir() else file.lstat().st_size
    return total


def _find_last_use(folder: Path) -> float:
    with contextlib.suppress(OSError):
        return folder.with_suffix(".used").stat().st_mtime
    return 0.0


def _take_use(path: Path) -> BinaryIO:
    """A shared lock on the copy. The file may be removed by an eviction between opening and locking: then again."""
    name = path.with_suffix(".used")
    while True:
        file = name.open("ab")
        fcntl.flock(file, fcntl.LOCK_SH)
        if _is_the_file(file, name):
            os.utime(name)
            return file
        file.close()


def _is_the_file(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is the one that lies at `path` now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
