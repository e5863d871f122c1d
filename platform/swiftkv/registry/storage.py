"""Object storage as the registry needs it: streamed objects, create-only objects, compare-and-swap, listing.

Knows nothing of models, versions or manifests. A folder on local disk and every bucket that obstore speaks
behave the same here; the two things that a local folder lacks (compare-and-swap, removing the staging files
of a killed writer) are filled in at the end of the class.
Called by: registry/registry.py, registry/files.py. Calls: obstore.
"""

import fcntl
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import LocalStore, from_url

from swiftkv.errors import ConfigError, RegistryError

if TYPE_CHECKING:
    from obstore import UpdateVersion
    from obstore.store import ObjectStore

CHUNK_BYTES = 8 * 1024 * 1024
"""Bytes read, hashed and sent at a time: the registry's memory is a few of these, whatever the file size."""

_MAX_PARTS = 10_000
"""Parts that S3 allows in one upload; larger files are sent in larger parts."""

_CONCURRENT_PARTS = 4
_SWAP_ATTEMPTS = 200
_SWAP_PAUSE_S = 0.05


class Storage:
    """One store: a folder (path or file:// URL), or a bucket (s3://, gs://, az://; obstore's own settings)."""

    def __init__(self, location: str | Path) -> None:
        self.location = str(location)
        self.local_root = _find_local_root(self.location)
        """Absolute folder of a local store, None for a bucket."""

    def list_folders(self, prefix: str) -> list[str]:
        """Names of the folders directly below `prefix`, sorted; none if there is no such prefix."""
        if self._is_absent():
            return []
        with self._explained("list", prefix):
            found = obstore.list_with_delimiter(self._store, prefix)["common_prefixes"]
        return sorted(path.rsplit("/", 1)[-1] for path in found)

    def list_files(self, prefix: str) -> dict[str, int]:
        """Every object below `prefix`: path relative to it -> bytes."""
        if self._is_absent():
            return {}
        with self._explained("list", prefix):
            found = obstore.list(self._store, prefix or None).collect()
        start = len(prefix) + 1 if prefix else 0
        return {item["path"][start:]: item["size"] for item in found}

    def read(self, path: str) -> bytes | None:
        """A small object's bytes, None if it does not exist."""
        if self._is_absent():
            return None
        with self._explained("read", path):
            try:
                return bytes(obstore.get(self._store, path).bytes())
            except FileNotFoundError:
                return None

    def exists(self, path: str) -> bool:
        """Whether an object is there."""
        if self._is_absent():
            return False
        with self._explained("look for", path):
            try:
                obstore.head(self._store, path)
            except FileNotFoundError:
                return False
        return True

    def stream(self, path: str) -> Iterator[bytes]:
        """A large object's bytes in chunks. Raises: RegistryError if it does not exist or breaks off."""
        with self._explained("read", path):
            for chunk in obstore.get(self._store, path).stream(min_chunk_size=CHUNK_BYTES):
                yield bytes(chunk)

    def upload(self, path: str, chunks: Iterator[bytes], size_bytes: int) -> None:
        """Write `path` from chunks, replacing what is there; it appears whole or not at all."""
        part_bytes = max(CHUNK_BYTES, -(-size_bytes // _MAX_PARTS))
        with self._explained("write", path):
            obstore.put(
                self._writable,
                path,
                chunks if size_bytes else b"",
                chunk_size=part_bytes,
                max_concurrency=_CONCURRENT_PARTS,
            )

    def create(self, path: str, content: bytes) -> bool:
        """Write a small object unless it exists; False if it does. Of many callers, one gets True."""
        with self._explained("create", path):
            try:
                obstore.put(self._writable, path, content, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def swap(self, path: str, change: Callable[[bytes | None], bytes]) -> None:
        """Replace a small object by `change(its bytes, or None)`; no concurrent swap is lost.

        Buckets: compare-and-swap on the ETag, tried again when another writer was first. Local folders: an
        exclusive file lock, which holds between the processes of one machine and dies with its holder.
        Raises: RegistryError when the store refuses, or other writers were first 200 times in a row.
        """
        if self.local_root is not None:
            with self._locked():
                content = change(self.read(path))
                with self._explained("write", path):
                    obstore.put(self._writable, path, content)
            return
        for _ in range(_SWAP_ATTEMPTS):
            if self._try_swap(path, change):
                return
            time.sleep(random.uniform(0, _SWAP_PAUSE_S))
        raise RegistryError(f"{self.location}/{path}: other writers were first each time. Try again.")

    def discard(self, prefix: str) -> None:
        """Remove every object below `prefix`; nothing happens if there is none."""
        if self.local_root is not None:
            # Not through obstore: it hides the `name#1` staging files that a killed writer leaves.
            shutil.rmtree(self.local_root / prefix, ignore_errors=True)
            return
        with self._explained("remove", prefix):
            paths = [item["path"] for item in obstore.list(self._store, prefix).collect()]
            obstore.delete(self._store, paths)

    @cached_property
    def _store(self) -> "ObjectStore":
        with self._explained("open", ""):
            if self.local_root is not None:
                return LocalStore(prefix=self.local_root)
            return from_url(self.location)

    @property
    def _writable(self) -> "ObjectStore":
        if self.local_root is not None:
            self.local_root.mkdir(parents=True, exist_ok=True)
        return self._store

    def _is_absent(self) -> bool:
        # Reading must not create the folder of a mistyped --store.
        return self.local_root is not None and not self.local_root.is_dir()

    def _try_swap(self, path: str, change: Callable[[bytes | None], bytes]) -> bool:
        with self._explained("write", path):
            try:
                result = obstore.get(self._store, path)
            except FileNotFoundError:
                return self.create(path, change(None))
            meta = result.meta
            # A None in this mapping is a TypeError in obstore 0.12, so absent parts are left out.
            found: UpdateVersion = {}
            if meta["e_tag"] is not None:
                found["e_tag"] = meta["e_tag"]
            if meta["version"] is not None:
                found["version"] = meta["version"]
            try:
                obstore.put(self._store, path, change(bytes(result.bytes())), mode=found)
            except PreconditionError:
                return False
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        assert self.local_root is not None
        with self._explained("lock", ""):
            self.local_root.mkdir(parents=True, exist_ok=True)
            lock = (self.local_root / ".lock").open("a")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _explained(self, action: str, path: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError, NotImplementedError) as error:
            reason = str(error).split("\n", 1)[0]
            raise RegistryError(f"{self.location}: cannot {action} {path or 'the store'}: {reason}") from error


def _find_local_root(location: str) -> Path | None:
    scheme, separator, rest = location.partition("://")
    if not separator:
        return Path(location).expanduser().absolute()
    if scheme == "file":
        return Path("/" + rest.lstrip("/"))
    if scheme not in ("s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss", "memory"):
        raise ConfigError(
            f"Store {location!r}: unknown scheme {scheme!r}. Give a folder, or a URL that begins with "
            "s3://, gs:// or az://."
        )
    return None
