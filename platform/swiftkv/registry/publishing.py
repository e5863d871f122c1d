"""Making one version exist: its bytes into blobs, then the manifest, create-only.

Killed before the manifest, nothing exists; the next publish of the same files finds the blobs that are there.
Moves no alias (aliases.py).
Called by: registry/registry.py. Calls: files.py, leases.py, manifest.py, storage.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from swiftkv.errors import RegistryError, VersionExistsError
from swiftkv.registry import layout
from swiftkv.registry.files import PART_BYTES, OnProgress, upload_files
from swiftkv.registry.leases import OnWait, changing
from swiftkv.registry.manifest import (
    Base,
    FileEntry,
    Manifest,
    Provenance,
    describe_code,
    describe_publisher,
    describe_recipe,
    parse_manifest,
)
from swiftkv.registry.storage import Storage

_NUMBERING_ATTEMPTS = 200


@dataclass(frozen=True)
class Draft:
    """What is to be published, checked, before it has a version."""

    name: str
    files: Mapping[str, Path]
    """Path in the version -> where the bytes are."""
    spec: dict[str, Any]
    provenance: Provenance
    base: Base | None = None
    base_paths: Mapping[str, str] = field(default_factory=dict)
    """Path in the version -> file of the base that it is."""

    def build_manifest(self, version: str, files: tuple[FileEntry, ...]) -> Manifest:
        """The manifest of these files, with this moment and this publisher."""
        recipe = self.provenance.recipe
        return Manifest(
            name=self.name,
            version=version,
            published_at=datetime.now(UTC),
            publisher=describe_publisher(),
            code_version=describe_code(),
            part_bytes=PART_BYTES,
            files=files,
            base=self.base,
            spec=self.spec,
            teacher=self.provenance.teacher,
            recipe=None if recipe is None else describe_recipe(recipe),
            data=self.provenance.data,
            training=self.provenance.training,
            evaluation=self.provenance.evaluation,
        )


def publish_draft(
    storage: Storage,
    draft: Draft,
    version: str | None,
    on_progress: OnProgress | None,
    on_wait: OnWait | None,
) -> Manifest:
    """The manifest of the version that now exists; `version` None takes the next whole number.

    Raises: VersionExistsError if another publisher was first.
    """
    stores_base = draft.base is None or draft.base.stored
    while True:
        with changing(storage, on_wait) as lease:
            files = upload_files(storage, draft.files, draft.base_paths, stores_base, on_progress)
            # A process that slept is taken for dead, and its blobs may be collected: then all is looked for again.
            if lease.is_fresh():
                manifest = _commit(storage, draft, version, files)
                if lease.is_fresh():
                    return manifest
                break
    with changing(storage, on_wait):  # slept at the commit: no one collects now, and what is missing is written again
        upload_files(storage, draft.files, draft.base_paths, stores_base, None)
    return manifest


def refuse_existing(storage: Storage, name: str, version: str) -> None:
    """Raises: VersionExistsError if the version exists or existed, saying since when and by whom."""
    content = storage.read(layout.manifest_path(name, version))
    if content is not None:
        manifest = parse_manifest(content, name, version)
        raise VersionExistsError(
            f"{name}@{version} exists already (published {manifest.published_at:%Y-%m-%d %H:%M} UTC by "
            f"{manifest.publisher}), and versions never change. Give another version, or none for the next number."
        )
    if storage.find_size(layout.removed_path(name, version)) is not None:
        raise VersionExistsError(
            f"{name}@{version} existed and was removed by `swiftkv models gc`; a version never means two things. "
            "Give another version, or none for the next number."
        )


def _commit(storage: Storage, draft: Draft, version: str | None, files: tuple[FileEntry, ...]) -> Manifest:
    for _ in range(_NUMBERING_ATTEMPTS):
        number = version or find_next_number(storage, draft.name)
        manifest = draft.build_manifest(number, files)
        if _create(storage, manifest):
            return manifest
        if version is not None:
            refuse_existing(storage, draft.name, version)
    raise VersionExistsError(f"{draft.name}: other publishers took each next number. Give a version.")


def _create(storage: Storage, manifest: Manifest) -> bool:
    path, content = layout.manifest_path(manifest.name, manifest.version), manifest.to_json()
    if storage.find_size(layout.removed_path(manifest.name, manifest.version)) is not None:
        return False
    try:
        created = storage.create(path, content)
    except RegistryError:
        # The answer may have been lost after the store took it: what the store holds now decides.
        if storage.read(path) is None:
            raise
        created = False
    # A request that the client repeated meets its own manifest, so "it exists" alone does not mean we lost.
    return created or storage.read(path) == content


def find_next_number(storage: Storage, name: str) -> str:
    """One more than the highest number that a version has or had."""
    taken = [int(known) for known in storage.list_folders(layout.versions_path(name)) if known.isdecimal()]
    for number in sorted(taken, reverse=True):
        # A local store keeps the empty folder of a manifest that was never written.
        paths = (layout.manifest_path(name, str(number)), layout.removed_path(name, str(number)))
        if any(storage.find_size(path) is not None for path in paths):
            return str(number + 1)
    return "1"
