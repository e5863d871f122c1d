"""Removing what is no longer needed: old versions that no alias means, then blobs that no manifest names.

A removed version leaves a small object, so that its number never means other bytes. Nobody publishes or moves an alias
meanwhile (leases.py). Nothing is removed from a store in which a manifest cannot be read.
Called by: registry/registry.py. Calls: registry/leases.py, registry/storage.py.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from swiftkv.errors import RegistryError
from swiftkv.registry import layout
from swiftkv.registry.leases import Lease, collecting
from swiftkv.registry.manifest import Manifest, describe_publisher
from swiftkv.registry.storage import Storage

if TYPE_CHECKING:
    from swiftkv.registry.registry import Registry

_BATCH = 500
_STAGING_AGE_S = 3600.0


@dataclass(frozen=True)
class Collection:
    """What was removed, or would be."""

    versions: tuple[str, ...]
    """NAME@VERSION."""
    num_blobs: int
    blob_bytes: int


def plan_collection(registry: "Registry", storage: Storage, keep: int) -> Collection:
    """What `collect` would remove now."""
    old = _choose_versions(registry, keep)
    unused = _find_unused_blobs(registry, storage, leave_out={(manifest.name, manifest.version) for manifest in old})
    return Collection(_name(old), len(unused), sum(unused.values()))


def collect(
    registry: "Registry", storage: Storage, keep: int, on_progress: Callable[[int, int], None] | None
) -> Collection:
    """Remove all but the newest `keep` versions of each model and those that an alias means or would roll back to.

    Raises: RegistryError if somebody else changes the store.
    """
    with collecting(storage) as lease:
        removed = _choose_versions(registry, keep)
        unused = _find_unused_blobs(registry, storage, leave_out={(old.name, old.version) for old in removed})
        for manifest in removed:
            _require_fresh(storage, lease)
            _remove_version(storage, manifest)
        _remove_blobs(storage, lease, unused, on_progress)
        storage.remove_staging_files(layout.BLOBS, _STAGING_AGE_S)
    return Collection(_name(removed), len(unused), sum(unused.values()))


def _name(manifests: list[Manifest]) -> tuple[str, ...]:
    return tuple(f"{manifest.name}@{manifest.version}" for manifest in manifests)


def _choose_versions(registry: "Registry", keep: int) -> list[Manifest]:
    chosen = []
    for name in registry.list_models():
        manifests = [registry.load_manifest(f"{name}@{version}") for version in registry.list_versions(name)]
        manifests.sort(key=lambda known: (known.published_at, layout.natural_order(known.version)))
        needed = _find_needed(registry, name)
        chosen += [manifest for manifest in manifests[:-keep] if manifest.version not in needed]
    return chosen


def _find_needed(registry: "Registry", name: str) -> set[str]:
    """Versions that an alias means, or would mean after a rollback."""
    records = (registry.load_alias(name, alias) for alias in registry.list_aliases(name))
    return {version for record in records for version in (record.version, *record.promoted[-2:])}


def _remove_version(storage: Storage, manifest: Manifest) -> None:
    about = {"digest": manifest.digest, "removed_at": datetime.now(UTC).isoformat(), "removed_by": describe_publisher()}
    storage.create(layout.removed_path(manifest.name, manifest.version), json.dumps(about, indent=1).encode())
    storage.remove([layout.manifest_path(manifest.name, manifest.version)])
    folder = layout.evaluations_path(manifest.name, manifest.version)
    storage.remove([f"{folder}/{name}" for name in storage.list_files(folder)])


def _find_unused_blobs(registry: "Registry", storage: Storage, leave_out: set[tuple[str, str]]) -> dict[str, int]:
    """Paths of the blobs that no manifest names -> bytes."""
    used: set[str] = set()
    for name in registry.list_models():
        for version in registry.list_versions(name):
            if (name, version) not in leave_out:
                used.update(registry.load_manifest(f"{name}@{version}").stored_blobs)
    found = storage.list_files(layout.BLOBS)
    return {
        f"{layout.BLOBS}/{path}": info.size_bytes for path, info in found.items() if path.rsplit("/", 1)[-1] not in used
    }


def _require_fresh(storage: Storage, lease: Lease) -> None:
    """Raises: RegistryError if this process slept so long that others do not wait for it any more."""
    if not lease.is_fresh():
        raise RegistryError(f"{storage.location}: slept too long while collecting. Run it again.")


def _remove_blobs(
    storage: Storage, lease: Lease, unused: dict[str, int], on_progress: Callable[[int, int], None] | None
) -> None:
    paths = list(unused)
    for start in range(0, len(paths), _BATCH):
        _require_fresh(storage, lease)
        storage.remove(paths[start : start + _BATCH])
        if on_progress is not None:
            on_progress(min(start + _BATCH, len(paths)), len(paths))
