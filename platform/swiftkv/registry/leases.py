"""Who is changing or collecting at this moment: small objects that are renewed while their owner lives.

A publisher relies on blobs that no manifest names yet, its own and those it found, and who moves an alias on a version;
`gc` removes blobs that no manifest names and versions that no alias means. So the ones wait while somebody collects,
and a collector does not begin while one of them is at work. Each writes its lease before it looks for the other's: in a
store whose reads see all earlier writes, at least one sees the other. A killed owner's lease is not renewed and counts
no more after LEASE_S, by the store's clock.
Called by: registry/publishing.py, registry/registry.py, registry/collecting.py. Calls: registry/storage.py.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from swiftkv.errors import RegistryError
from swiftkv.registry.layout import CHANGING, COLLECTING, build_id
from swiftkv.registry.manifest import describe_publisher
from swiftkv.registry.storage import Storage

LEASE_S = 600.0
"""A lease that was not renewed for so long is nobody's."""

RENEW_S = 60.0
PATIENCE_S = 10.0
"""How long a collector waits for others, who wait for it meanwhile unless they were first."""

_POLL_S = 1.0


OnWait = Callable[[str], None]
"""Called with who is waited for."""


class Lease:
    """An object in the store that lives as long as this process and the `with` block."""

    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage = storage
        self._path = f"{folder}/{build_id()}"
        self._ended = threading.Event()
        self._renewed_s = time.time()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")

    def __enter__(self) -> "Lease":
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        try:
            self._storage.remove([self._path])
        except RegistryError:
            pass  # it expires

    def is_fresh(self) -> bool:
        """Whether nobody can have taken the owner for dead, as after a suspended laptop; wall time counts."""
        return time.time() - self._renewed_s < LEASE_S / 2 and self._storage.find_size(self._path) is not None

    def find_others(self, folder: str) -> list[str]:
        """Who else holds a lease below `folder`: what each says of itself. Expired leases are removed."""
        leases = self._storage.list_files("leases")
        own = self._path.removeprefix("leases/")
        below = folder.removeprefix("leases/") + "/"
        if own not in leases:
            raise RegistryError(f"{self._storage.location}/{self._path}: was removed meanwhile. Try again.")
        now = leases[own].modified_at
        others = {path: info for path, info in leases.items() if path.startswith(below) and path != own}
        limit = now - timedelta(seconds=LEASE_S)
        expired = [f"leases/{path}" for path, info in others.items() if info.modified_at < limit]
        self._storage.remove(expired)
        alive = [self._storage.read(f"leases/{path}") for path, info in others.items() if info.modified_at >= limit]
        return sorted(content.decode(errors="replace") for content in alive if content is not None)

    def _write(self) -> None:
        self._storage.write(self._path, describe_publisher().encode())
        self._renewed_s = time.time()

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                # One that was removed is not written again: its owner was taken for dead, and has to see that.
                if self._storage.find_size(self._path) is not None:
                    self._write()
            except RegistryError:
                continue


@contextmanager
def changing(storage: Storage, on_wait: OnWait | None = None) -> Iterator[Lease]:
    """A block in which nobody collects; it begins when nobody does. `on_wait` is told once who does."""
    told = False
    while True:
        with Lease(storage, CHANGING) as lease:
            collectors = lease.find_others(COLLECTING)
            if not collectors:
                yield lease
                return
        # Waiting without the lease, for which the collector would wait in turn.
        if not told and on_wait is not None:
            on_wait(", ".join(collectors))
        told = True
        time.sleep(_POLL_S)


@contextmanager
def collecting(storage: Storage) -> Iterator[Lease]:
    """A block in which nobody else changes the store. Raises: RegistryError if somebody does, for more than seconds."""
    with Lease(storage, COLLECTING) as lease:
        deadline = time.monotonic() + PATIENCE_S
        while others := [*lease.find_others(COLLECTING), *lease.find_others(CHANGING)]:
            if time.monotonic() > deadline:
                raise RegistryError(
                    f"{storage.location}: {', '.join(others)} publishes, moves an alias or removes at this moment. "
                    f"Wait until that has ended; if its process was killed, {LEASE_S / 60:.0f} minutes."
                )
            time.sleep(_POLL_S)
        yield lease
