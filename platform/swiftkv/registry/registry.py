"""The registry: publish a checkpoint folder as an immutable version, find it again, get it back verified.

    models/<name>/versions/<version>/upload-<id>/<files>   written first, by one publish alone
    models/<name>/versions/<version>/manifest.json         written last, create-only: now the version exists
    models/<name>/aliases/<alias>.json                     moved by compare-and-swap, with its history

Each publish has an upload folder of its own, so two publishers of one version cannot mix their bytes, and one
that is killed leaves files that no manifest names: the next publish of that model removes them.
Does not decide what may be served (that is evaluation's gates) and evicts nothing from the cache.
Called by: cli/models.py, the distill job, serving. Calls: checks.py, publishing.py, files.py, cache.py.
"""

import contextlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from swiftkv.errors import ConfigError, IntegrityError, RegistryError, VersionExistsError, VersionNotFoundError
from swiftkv.registry import layout
from swiftkv.registry.cache import fetch_into_cache
from swiftkv.registry.checks import check_checkpoint
from swiftkv.registry.files import OnProgress, check_files, find_files
from swiftkv.registry.layout import check_name
from swiftkv.registry.manifest import Manifest, Provenance, describe_publisher, parse_manifest
from swiftkv.registry.publishing import Draft, discard_abandoned, publish_version, refuse_existing
from swiftkv.registry.storage import Storage

LATEST = "latest"
"""Alias that a bare model name means, where it is set."""

_NUMBERING_ATTEMPTS = 20


@dataclass(frozen=True)
class FetchedVersion:
    """A version whose every byte was compared with its manifest, in a folder that an engine can load."""

    path: Path
    name: str
    version: str
    manifest: Manifest


class Registry:
    """Models in one store: a local folder, or the URL of a bucket (s3://, gs://, az://).

    Every method raises RegistryError when the store itself refuses (permissions, network, disk).
    """

    def __init__(self, store: str | Path) -> None:
        self._storage = Storage(store)

    @property
    def location(self) -> str:
        """The store, as it was given."""
        return self._storage.location

    def publish(
        self,
        folder: Path,
        name: str,
        *,
        version: str | None = None,
        provenance: Provenance | None = None,
        alias: str | None = None,
        on_progress: OnProgress | None = None,
        allowed_model_types: Collection[str] | None = None,
    ) -> Manifest:
        """The manifest of the new version that holds the files of `folder`.

        `version` None takes the next whole number. `alias` is moved to the version once it exists. Each file is
        read once; names that begin with a dot are left out. `allowed_model_types` None allows every family.
        Raises: CheckpointError if the folder is no SwiftKV checkpoint that is safe to load; VersionExistsError
        if the version exists or another publisher of it was first; ConfigError for a name that is not allowed.
        """
        check_name(name, "Model name")
        if alias is not None:
            self._check_alias(name, alias)
        if version is not None:
            self._check_new_version(name, version)
        folder = Path(folder)
        spec = check_checkpoint(folder, allowed_model_types)
        draft = Draft(name, find_files(folder), spec, provenance or Provenance())
        manifest = self._publish_draft(draft, version, on_progress)
        if alias is not None:
            self.set_alias(name, alias, manifest.version)
        self._discard_abandoned(name)
        return manifest

    def resolve(self, reference: str) -> tuple[str, str]:
        """Name and version that NAME (its alias `latest`, else its newest), NAME@VERSION or NAME@ALIAS means.

        Raises: VersionNotFoundError saying which names, versions and aliases there are.
        """
        name, at, label = reference.partition("@")
        check_name(name, "Model name")
        if not at:
            return name, self._read_alias(name, LATEST) or self._find_newest(name)
        check_name(label, "Version or alias")
        if self._has_version(name, label):
            return name, label
        version = self._read_alias(name, label)
        if version is None:
            raise self._describe_missing(name, label)
        return name, version

    def load_manifest(self, reference: str) -> Manifest:
        """The manifest of a version. Raises: VersionNotFoundError; IntegrityError if it is damaged."""
        name, version = self.resolve(reference)
        content = self._storage.read(layout.manifest_path(name, version))
        if content is None:
            raise self._describe_missing(name, version)
        return parse_manifest(content, name, version)

    def list_models(self) -> list[str]:
        """Names of the models that have a version, sorted."""
        found = [name for name in self._storage.list_folders("models") if layout.is_name(name)]
        return [name for name in found if self.list_versions(name)]

    def list_versions(self, name: str) -> list[str]:
        """Published versions of a model, 2 before 10; none for an unknown model."""
        found = self._storage.list_folders(layout.versions_path(check_name(name, "Model name")))
        versions = [version for version in found if layout.is_name(version) and self._has_version(name, version)]
        return sorted(versions, key=layout.natural_order)

    def list_aliases(self, name: str) -> dict[str, str]:
        """Aliases of a model: alias -> version."""
        files = self._storage.list_files(layout.aliases_path(check_name(name, "Model name")))
        found = sorted(path.removesuffix(".json") for path in files if path.endswith(".json"))
        aliases = [alias for alias in found if layout.is_name(alias)]
        return {alias: version for alias in aliases if (version := self._read_alias(name, alias))}

    def verify(self, reference: str, on_progress: OnProgress | None = None) -> Manifest:
        """The manifest of a version, after every byte in the store was compared with it.

        Raises: IntegrityError naming each file that differs, what the manifest says and what was found.
        """
        manifest = self.load_manifest(reference)
        self._refuse_strangers(manifest)
        check_files(self._storage, _files_path(manifest), manifest.files, on_progress)
        return manifest

    def fetch(self, reference: str, on_progress: OnProgress | None = None) -> FetchedVersion:
        """A folder with the files of a version, every byte verified.

        A local store's own folder, verified in place; else a copy in home()/cache/<name>/<digest>, which is
        verified again on every call and downloaded again if it was damaged.
        Raises: VersionNotFoundError; IntegrityError as `verify`.
        """
        if self._storage.local_root is not None:
            manifest = self.verify(reference, on_progress)
            path = self._storage.local_root / _files_path(manifest)
        else:
            manifest = self.load_manifest(reference)
            path = fetch_into_cache(self._storage, _files_path(manifest), manifest, on_progress)
        return FetchedVersion(path, manifest.name, manifest.version, manifest)

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Move an alias to a version; concurrent moves follow one another and each is kept in the history.

        Raises: VersionNotFoundError if there is no such version; ConfigError for a name that is not allowed.
        """
        self._check_alias(name, alias)
        if not self._has_version(name, version):
            raise self._describe_missing(name, version)
        move = {"version": version, "moved_at": datetime.now(UTC).isoformat(), "moved_by": describe_publisher()}

        def append(content: bytes | None) -> bytes:
            history = [] if content is None else _parse_alias(content, name, alias)["history"]
            return json.dumps({"format": 1, "version": version, "history": [*history, move]}, indent=1).encode()

        self._storage.swap(layout.alias_path(name, alias), append)

    def _publish_draft(self, draft: Draft, version: str | None, on_progress: OnProgress | None) -> Manifest:
        if version is not None:
            return publish_version(self._storage, draft, version, on_progress)
        for _ in range(_NUMBERING_ATTEMPTS):
            taken = [int(known) for known in self.list_versions(draft.name) if known.isdecimal()]
            try:
                return publish_version(self._storage, draft, str(max(taken, default=0) + 1), on_progress)
            except VersionExistsError:
                continue  # another publisher took that number meanwhile
        raise VersionExistsError(f"{draft.name}: other publishers took each next number. Give a version.")

    def _discard_abandoned(self, name: str) -> None:
        # In every version: a publisher may have been killed after its manifest, before it came to this. Leftovers
        # cost space, not correctness, so a bucket that forbids deleting is no reason to fail.
        with contextlib.suppress(RegistryError):
            for version in self.list_versions(name):
                discard_abandoned(self._storage, name, version)

    def _refuse_strangers(self, manifest: Manifest) -> None:
        found = self._storage.list_files(layout.version_path(manifest.name, manifest.version))
        strangers = sorted(path for path in found if not layout.belongs_to_version(path))
        if strangers:
            raise IntegrityError(
                f"{manifest.name}@{manifest.version}: not in the manifest, but found beside it: "
                f"{', '.join(strangers)}. Remove what was put there by hand."
            )

    def _check_new_version(self, name: str, version: str) -> None:
        check_name(version, "Version")
        if version == LATEST or self._read_alias(name, version) is not None:
            raise ConfigError(f"Version {version!r} is an alias. Choose another version, or none for the next number.")
        refuse_existing(self._storage, name, version)

    def _check_alias(self, name: str, alias: str) -> None:
        check_name(name, "Model name")
        check_name(alias, "Alias")
        if alias.isdecimal() or self._has_version(name, alias):
            raise ConfigError(f"Alias {alias!r} is, or will be, a version. Choose a word, such as 'production'.")

    def _has_version(self, name: str, version: str) -> bool:
        return self._storage.exists(layout.manifest_path(name, version))

    def _find_newest(self, name: str) -> str:
        manifests = [self.load_manifest(f"{name}@{version}") for version in self.list_versions(name)]
        if not manifests:
            raise self._describe_missing(name, None)
        return max(manifests, key=lambda known: (known.published_at, layout.natural_order(known.version))).version

    def _read_alias(self, name: str, alias: str) -> str | None:
        content = self._storage.read(layout.alias_path(name, alias))
        return None if content is None else str(_parse_alias(content, name, alias)["version"])

    def _describe_missing(self, name: str, label: str | None) -> VersionNotFoundError:
        versions = self.list_versions(name)
        if not versions:
            models = ", ".join(self.list_models()) or "none"
            return VersionNotFoundError(
                f"No model {name!r} in {self.location}. Models there: {models}. Publish it, or name another store."
            )
        aliases = ", ".join(self.list_aliases(name)) or "none"
        return VersionNotFoundError(
            f"{name!r} has no version or alias {label!r} in {self.location}. Versions: {', '.join(versions)}; "
            f"aliases: {aliases}. Choose one of these."
        )


def _files_path(manifest: Manifest) -> str:
    return layout.upload_path(manifest.name, manifest.version, manifest.upload)


def _parse_alias(content: bytes, name: str, alias: str) -> dict[str, Any]:
    try:
        record = json.loads(content)
        check_name(record["version"], "Version")
        if not isinstance(record["history"], list):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise IntegrityError(
            f"{layout.alias_path(name, alias)} is damaged: {content[:100]!r}. Remove it, and set the alias again."
        ) from None
    return dict(record)
