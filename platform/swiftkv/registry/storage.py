"""Object storage as the registry needs it: objects, create-only objects, compare-and-swap, conditional reads, listing.

Knows nothing of models, versions or manifests. A folder on local disk and every bucket that obstore speaks
behave the same here; the two things that a local folder lacks (compare-and-swap, removing the staging files
of a killed writer) are filled in at the end of the class. Every method may be called from many threads.
Called by: the other files of registry/. Calls: obstore.
"""

import fcntl
import os
import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotModifiedError, PreconditionError
from obstore.store import LocalStore, from_url

from swiftkv.errors import ConfigError, RegistryError, StoreError

if TYPE_CHECKING:
    from obstore import GetOptions, UpdateVersion
    from obstore.store import ObjectStore, RetryConfig
    from typing_extensions import Buffer

_SWAP_ATTEMPTS = 200
_SWAP_PAUSE_S = 0.05
_RETRIES: "RetryConfig" = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}
"""A bucket that cannot be reached is reported within a minute, not obstore's three."""


@dataclass(frozen=True)
class ObjectInfo:
    """What a listing says of an object."""

    size_bytes: int
    modified_at: datetime
    """By the store's clock."""


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

    def list_files(self, prefix: str) -> dict[str, ObjectInfo]:
        """Every object below `prefix`: path relative to it -> what is known of it."""
        if self._is_absent():
            return {}
        with self._explained("list", prefix):
            found = obstore.list(self._store, prefix or None).collect()
        start = len(prefix) + 1 if prefix else 0
        return {item["path"][start:]: ObjectInfo(item["size"], item["last_modified"]) for item in found}

    def read(self, path: str) -> bytes | None:
        """An object's bytes, None if it does not exist."""
        buffer = self.read_buffer(path)
        return None if buffer is None else bytes(buffer)

    def read_buffer(self, path: str) -> "Buffer | None":
        """As `read`, without copying what may be many megabytes."""
        if self._is_absent():
            return None
        with self._explained("read", path):
            try:
                return obstore.get(self._store, path).bytes()
            except FileNotFoundError:
                return None

    def read_if_changed(self, path: str, tag: str | None) -> tuple[bytes, str] | None:
        """A small object's bytes and its tag; None while its tag is still `tag`. One request.

        Raises: FileNotFoundError if it does not exist.
        """
        if self._is_absent():
            raise FileNotFoundError(f"{self.location}/{path}")
        options: GetOptions = {} if tag is None else {"if_none_match": tag}
        with self._explained("read", path):
            try:
                result = obstore.get(self._store, path, options=options)
                return bytes(result.bytes()), result.meta["e_tag"] or ""
            except NotModifiedError:
                return None
            except FileNotFoundError:
                pass  # raised below, where it is not taken for a store that refuses
        raise FileNotFoundError(f"{self.location}/{path}")

    def find_size(self, path: str) -> int | None:
        """An object's bytes by its listing, None if it does not exist."""
        if self._is_absent():
            return None
        with self._explained("look for", path):
            try:
                return obstore.head(self._store, path)["size"]
            except FileNotFoundError:
                return None

    def write(self, path: str, content: bytes) -> None:
        """Write an object, replacing what is there; it appears whole or not at all."""
        with self._explained("write", path):
            obstore.put(self._writable, path, content, use_multipart=False)

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

    def remove(self, paths: Sequence[str]) -> None:
        """Remove objects; those that are not there any more do not matter."""
        if paths and not self._is_absent():
            with self._explained("remove", paths[0]):
                try:
                    obstore.delete(self._store, paths)
                except FileNotFoundError:  # folders and some buckets mind an object that is gone, and stop at it
                    for path in paths:
                        with suppress(FileNotFoundError):
                            obstore.delete(self._store, path)

    def remove_staging_files(self, prefix: str, older_than_s: float) -> int:
        """Remove what writers that were killed left below `prefix` of a local folder; how many files.

        obstore writes `name#1` and renames it, and hides such files; a bucket keeps no part of a write.
        """
        if self.local_root is None:
            return 0
        limit = time.time() - older_than_s
        staged = [path for path in (self.local_root / prefix).rglob("*#*") if path.stat().st_mtime < limit]
        for path in staged:
            path.unlink(missing_ok=True)
        return len(staged)

    def check_writable(self, prefix: str) -> None:
        """Writes an object below `prefix` and removes it again, with the folders that it needed.

        Raises: RegistryError if the store cannot be reached, or refuses.
        """
        path = f"{prefix}/check-{secrets.token_hex(8)}"
        root = self.local_root
        added = [] if root is None else [folder for folder in (root / path).parents if not os.path.exists(folder)]
        try:
            self.write(path, b"")
            self.remove([path])
        finally:
            for folder in added:  # the deepest first
                with suppress(OSError):
                    folder.rmdir()

    @cached_property
    def _store(self) -> "ObjectStore":
        with self._explained("open", ""):
            if self.local_root is not None:
                return LocalStore(prefix=self.local_root)
            # Plain HTTP only to an endpoint that was given as such, as for a store on one's own machine.
            if self.location.startswith("s3") and _find_endpoint().startswith("http://"):
                return self._open_url(client_options={"allow_http": True})
            return self._open_url()

    def _open_url(self, **settings: Any) -> "ObjectStore":
        try:
            return from_url(self.location, retry_config=_RETRIES, **settings)
        except ValueError as error:  # of a URL that is none; elsewhere one would be a fault of ours
            raise self._explain("open", "", error) from error

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
            raise self._explain(action, path, error) from error

    def _explain(self, action: str, path: str, error: Exception) -> StoreError:
        reason = str(error).split("\n", 1)[0]
        if "169.254.169.254" in reason:  # where a machine in the cloud asks for its role
            reason = "no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run where a role is given"
        return StoreError(f"{self.location}: cannot {action} {path or 'the store'}: {reason}")


def _find_endpoint() -> str:
    """The S3 endpoint that obstore takes from the environment."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def _find_local_root(location: str) -> Path | None:
    if not location:
        raise ConfigError("Store '': give a folder, or a URL that begins with s3://, gs:// or az://.")
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
