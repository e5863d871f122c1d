"""Making one version exist: upload under a folder of this publish alone, then the manifest, create-only.

Chooses no version number and moves no alias (registry.py does).
Called by: registry/registry.py. Calls: files.py, manifest.py, storage.py.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from swiftkv.errors import RegistryError, VersionExistsError
from swiftkv.registry import layout
from swiftkv.registry.files import OnProgress, upload_files
from swiftkv.registry.manifest import (
    FileEntry,
    Manifest,
    Provenance,
    describe_code,
    describe_publisher,
    describe_recipe,
    parse_manifest,
)
from swiftkv.registry.storage import Storage


@dataclass(frozen=True)
class Draft:
    """What is to be published, checked, before it has a version."""

    name: str
    files: Mapping[str, Path]
    """Path in the version -> where the bytes are."""
    spec: dict[str, Any]
    provenance: Provenance

    def build_manifest(self, version: str, upload: str, files: tuple[FileEntry, ...]) -> Manifest:
        """The manifest of these files, with this moment and this publisher."""
        recipe = self.provenance.recipe
        return Manifest(
            name=self.name,
            version=version,
            published_at=datetime.now(UTC),
            publisher=describe_publisher(),
            code_version=describe_code(),
            upload=upload,
            files=files,
            spec=self.spec,
            teacher=self.provenance.teacher,
            recipe=None if recipe is None else describe_recipe(recipe),
            data=self.provenance.data,
            training=self.provenance.training,
            evaluation=self.provenance.evaluation,
        )


def publish_version(storage: Storage, draft: Draft, version: str, on_progress: OnProgress | None) -> Manifest:
    """The manifest of the version that now exists.

    Raises: VersionExistsError if another publisher was first; then nothing of this attempt is left.
    """
    upload = layout.build_upload_name()
    prefix = layout.upload_path(draft.name, version, upload)
    try:
        files = upload_files(storage, prefix, draft.files, on_progress)
    except BaseException as error:
        with contextlib.suppress(RegistryError):
            storage.discard(prefix)
        # The publisher that was first removes what others are still uploading, and that fails them here.
        if isinstance(error, RegistryError):
            refuse_existing(storage, draft.name, version)
        raise
    manifest = draft.build_manifest(version, upload, files)
    _commit(storage, manifest)
    return manifest


def refuse_existing(storage: Storage, name: str, version: str) -> None:
    """Raises: VersionExistsError if the version exists, saying since when and by whom."""
    content = storage.read(layout.manifest_path(name, version))
    if content is None:
        return
    manifest = parse_manifest(content, name, version)
    raise VersionExistsError(
        f"{name}@{version} exists already (published {manifest.published_at:%Y-%m-%d %H:%M} UTC by "
        f"{manifest.publisher}), and versions never change. Give another version, or none for the next number."
    )


def discard_abandoned(storage: Storage, name: str, version: str) -> None:
    """Remove the uploads beside an existing version's own: killed attempts, and attempts that will be refused.

    No manifest can name them any more, whoever is still writing them.
    """
    uploads = storage.list_folders(layout.version_path(name, version))
    content = storage.read(layout.manifest_path(name, version)) if len(uploads) > 1 else None
    if content is None:
        return
    own = parse_manifest(content, name, version).upload
    for upload in uploads:
        if upload != own:
            storage.discard(layout.upload_path(name, version, upload))


def _commit(storage: Storage, manifest: Manifest) -> None:
    path, content = layout.manifest_path(manifest.name, manifest.version), manifest.to_json()
    try:
        created = storage.create(path, content)
    except RegistryError:
        # The answer may have been lost after the store took it: what the store holds now decides.
        if storage.read(path) is None:
            raise
        created = False
    # A request that the client repeated meets its own manifest, so "it exists" alone does not mean we lost.
    if not created and storage.read(path) != content:
        with contextlib.suppress(RegistryError):
            storage.discard(layout.upload_path(manifest.name, manifest.version, manifest.upload))
        refuse_existing(storage, manifest.name, manifest.version)
