"""The registry: publish a checkpoint folder as an immutable version, find it again, get it back verified.

    blobs/<..>/<SHA-256>                            written first: parts of files, shared by all versions
    models/<name>/versions/<version>/manifest.json  written last, create-only: now the version exists
    models/<name>/aliases/<alias>.json              moved by compare-and-swap, with its history

Called by: cli/models.py, the distill job, serving.
Calls: checks.py, measured.py, publishing.py, files.py, cache.py, aliases.py, evaluations.py, collecting.py,
metering.py.
"""

import fcntl
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import JsonValue

from swiftkv.errors import CheckpointError, ConfigError, IntegrityError, RegistryError, VersionNotFoundError
from swiftkv.hub import find_model_folder
from swiftkv.registry import collecting, evaluations, layout
from swiftkv.registry.aliases import AliasRecord, move_alias, parse_alias, read_alias, roll_back
from swiftkv.registry.cache import CachedCopy, fetch_into_cache, keep_manifest, locate_copy, read_kept_manifest
from swiftkv.registry.checks import check_checkpoint, check_without_weights
from swiftkv.registry.evaluations import EvaluationRecord, GateResult
from swiftkv.registry.files import (
    OnProgress,
    ReadPart,
    check_blobs,
    fill_folder,
    find_files,
    read_at,
    require_space,
)
from swiftkv.registry.layout import check_name
from swiftkv.registry.leases import OnWait, changing
from swiftkv.registry.manifest import Base, FileEntry, Manifest, Provenance, parse_manifest
from swiftkv.registry.measured import require_own_gate
from swiftkv.registry.metering import Operation, count_bytes, metered
from swiftkv.registry.publishing import Draft, publish_draft, refuse_existing
from swiftkv.registry.storage import Storage
from swiftkv.registry.streaming import RawTensor, is_weights, stream_tensors

LATEST = "latest"
"""Alias that a bare model name means, where it is set."""


@dataclass(frozen=True)
class FetchedVersion:
    """A version whose every byte was compared with its manifest, in a folder that an engine can load."""

    path: Path
    """The same on every node with the same home."""
    name: str
    version: str
    manifest: Manifest
    copy: CachedCopy
    """While it lives, and in this process, the folder is not evicted."""


@dataclass(frozen=True)
class AliasState:
    """What an alias meant when it was looked at."""

    version: str
    tag: str
    """To be given when it is looked at again."""


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

    @metered("publish")
    def publish(
        self,
        folder: Path,
        name: str,
        *,
        version: str | None = None,
        provenance: Provenance | None = None,
        base: Base | None = None,
        base_paths: Mapping[str, str] | None = None,
        on_progress: OnProgress | None = None,
        on_wait: OnWait | None = None,
        allowed_model_types: Collection[str] | None = None,
    ) -> Manifest:
        """The manifest of the new version that holds the files of `folder`.

        `version` None takes the next whole number. Each file is read once (the student's tensors once more, if the
        provenance has a gate's verdict); parts that the store has already are not sent again; names that begin with a
        dot are left out. `base_paths`: the files that are the base's -> its names for them. `on_wait` is told who
        collects, if that is waited for. `allowed_model_types` None allows every family.
        Raises: CheckpointError if the folder is no SwiftKV checkpoint that is safe to load, or the provenance has a
        gate's verdict on another one; VersionExistsError if the version exists or another publisher of it was first;
        ConfigError for a name that is not allowed.
        """
        check_name(name, "Model name")
        if version is not None:
            self._check_new_version(name, version)
        folder = Path(folder)
        spec, origin = check_checkpoint(folder, allowed_model_types), provenance or Provenance()
        require_own_gate(folder, origin.evaluation)
        draft = Draft(name, find_files(folder), spec, origin, base, base_paths or {})
        return publish_draft(self._storage, draft, version, on_progress, on_wait)

    def resolve(self, reference: str) -> tuple[str, str]:
        """Name and version that NAME (its alias `latest`, else its newest), NAME@VERSION or NAME@ALIAS means.

        Raises: VersionNotFoundError saying which names, versions and aliases there are.
        """
        name, at, label = reference.partition("@")
        check_name(name, "Model name")
        if not at:
            return name, self._find_alias(name, LATEST) or self._find_newest(name)
        check_name(label, "Version or alias")
        if self._has_version(name, label):
            return name, label
        version = self._find_alias(name, label)
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
        return {alias: version for alias in aliases if (version := self._find_alias(name, alias))}

    def load_alias(self, name: str, alias: str) -> AliasRecord:
        """An alias with its history. Raises: VersionNotFoundError; IntegrityError if it is damaged."""
        record = read_alias(self._storage, check_name(name, "Model name"), check_name(alias, "Alias"))
        if record is None:
            raise self._describe_missing(name, alias)
        return record

    def watch_alias(self, name: str, alias: str, tag: str | None = None) -> AliasState | None:
        """What the alias means, None while it has not moved since it had this tag. One conditional read.

        Raises: VersionNotFoundError if there is no such alias; IntegrityError if it is damaged.
        """
        try:
            changed = self._storage.read_if_changed(layout.alias_path(name, alias), tag)
        except FileNotFoundError:
            raise self._describe_missing(name, alias) from None
        return None if changed is None else AliasState(parse_alias(changed[0], name, alias).version, changed[1])

    @metered("verify")
    def verify(self, reference: str, on_progress: OnProgress | None = None) -> Manifest:
        """The manifest of a version, after every byte in the store was compared with it.

        Raises: IntegrityError naming each file that differs, what the manifest says and what was found.
        """
        manifest = self.load_manifest(reference)
        check_blobs(self._storage, manifest, on_progress)
        return manifest

    @metered("fetch")
    def fetch(self, reference: str, on_progress: OnProgress | None = None) -> FetchedVersion:
        """The node's copy of a version, every byte verified on every call; what is missing or damaged is downloaded.

        Raises: VersionNotFoundError; IntegrityError as `verify`; CheckpointError if it is not safe to load.
        """
        return self._fetch(self.load_manifest(reference), on_progress)

    @metered("fetch")
    def fetch_without_weights(self, reference: str) -> FetchedVersion:
        """As `fetch`, but for the tensors: configuration and tokenizer, for an engine that streams the rest."""
        return self._fetch_light(self.load_manifest(reference))

    @metered("fetch")
    def fetch_resolved(
        self, reference: str, digest: str, with_weights: bool = True, on_progress: OnProgress | None = None
    ) -> FetchedVersion:
        """As `fetch`, or `fetch_without_weights`, of the very files that NAME@VERSION was when somebody resolved it.

        A node that has a copy verifies it without the store.
        Raises: as `fetch`; IntegrityError if the store has other files under that name.
        """
        name, _, version = reference.partition("@")
        kept = read_kept_manifest(locate_copy(digest, with_weights), name, version, digest)
        manifest = kept or self.load_manifest(reference)
        if manifest.digest != digest:
            raise IntegrityError(
                f"{reference} has the digest {manifest.digest} in {self.location}, and {digest} was resolved: it is "
                "another store, or the version was published anew. Deploy again."
            )
        return self._fetch(manifest, on_progress) if with_weights else self._fetch_light(manifest)

    def stream_tensors(self, reference: str, wants: Callable[[str], bool]) -> Iterator[RawTensor]:
        """A version's tensors that `wants` says yes to, each verified before it comes; nothing is written.

        Raises: VersionNotFoundError; IntegrityError naming file and part if bytes differ from the manifest.
        """
        manifest = self.load_manifest(reference)
        return stream_tensors(manifest, self._build_reader(manifest, "stream"), wants)

    @metered("pull")
    def pull(self, reference: str, folder: Path, on_progress: OnProgress | None = None) -> Manifest:
        """Write a version's files, verified, into a new folder; one that was broken off goes on where it was.

        Raises: as `fetch`; ConfigError if the folder exists.
        """
        manifest = self.load_manifest(reference)
        if folder.exists():
            raise ConfigError(f"{folder}: exists already. Give a folder that does not.")
        partial = folder.absolute().with_name(f".{folder.name}.{manifest.digest[:16]}.partial")
        try:
            partial.mkdir(parents=True, exist_ok=True)
            lock = os.open(partial, os.O_RDONLY)
        except OSError as error:
            raise RegistryError(f"{folder}: cannot be written: {error.strerror}.") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = sum(file.stat().st_blocks * 512 for file in partial.rglob("*") if file.is_file())
            require_space(partial, manifest.total_bytes - there)
            fill_folder(partial, manifest, self._build_reader(manifest, "pull"), on_progress)
            with _refusing():
                check_checkpoint(partial)
            partial.rename(folder)
        except BlockingIOError:
            raise RegistryError(f"{folder}: another process pulls into it at this moment.") from None
        except OSError as error:
            raise RegistryError(f"{folder}: cannot be written: {error.strerror}.") from None
        finally:
            os.close(lock)
        return manifest

    def set_alias(
        self, name: str, alias: str, version: str, forced: str | None = None, on_wait: OnWait | None = None
    ) -> None:
        """Move an alias to a version; concurrent moves follow one another and each is kept in the history.

        `forced`: why it is moved without a gate, for the history. `on_wait` is told who collects, if anybody does.
        Raises: VersionNotFoundError if there is no such version; ConfigError for a name that is not allowed.
        """
        self._check_alias(name, alias)
        with changing(self._storage, on_wait):
            if not self._has_version(name, version):
                raise self._describe_missing(name, version)
            move_alias(self._storage, name, alias, version, forced)

    def promote(self, reference: str, alias: str, forced: str | None = None, on_wait: OnWait | None = None) -> Manifest:
        """Move an alias to a version that has passed its newest gate, or has not, `forced` saying why.

        Raises: RegistryError naming the limits that were missed; as `set_alias`.
        """
        manifest = self.load_manifest(reference)
        self._check_alias(manifest.name, alias)
        if forced is None:
            evaluations.require_gate(self._storage, manifest)
        self.set_alias(manifest.name, alias, manifest.version, forced, on_wait)
        return manifest

    def rollback(self, name: str, alias: str, on_wait: OnWait | None = None) -> str:
        """Move an alias to what was promoted before; that version. The history is kept.

        Raises: VersionNotFoundError if there is nothing before.
        """
        self._check_alias(name, alias)
        with changing(self._storage, on_wait):
            return roll_back(self._storage, name, alias)

    def add_evaluation(
        self, reference: str, figures: dict[str, JsonValue], gate: GateResult | None = None
    ) -> EvaluationRecord:
        """Keep what was measured of a version; its manifest stays as it is."""
        return evaluations.add_evaluation(self._storage, self.load_manifest(reference), figures, gate)

    def list_evaluations(self, reference: str) -> list[EvaluationRecord]:
        """What was measured of a version after it was published, oldest first."""
        return evaluations.list_evaluations(self._storage, self.load_manifest(reference))

    def collect(self, keep: int, dry_run: bool = False, on_progress: OnProgress | None = None) -> collecting.Collection:
        """Remove all but the newest `keep` versions of each model and those that aliases need, and unused blobs.

        `dry_run` only tells what would be removed.
        Raises: RegistryError if somebody else changes the store, or a manifest cannot be read.
        """
        if keep < 1:
            raise ConfigError(f"keep is {keep}: at least one version of each model stays.")
        if dry_run:
            return collecting.plan_collection(self, self._storage, keep)
        return collecting.collect(self, self._storage, keep, on_progress)

    def _fetch(self, manifest: Manifest, on_progress: OnProgress | None) -> FetchedVersion:
        path = locate_copy(manifest.digest)
        copy = fetch_into_cache(path, manifest, self._build_reader(manifest, "fetch"), on_progress)
        with _refusing(copy):
            check_checkpoint(path)
        keep_manifest(path, manifest)
        return FetchedVersion(path, manifest.name, manifest.version, manifest, copy)

    def _fetch_light(self, manifest: Manifest) -> FetchedVersion:
        light = manifest.model_copy(
            update={"files": tuple(entry for entry in manifest.files if not is_weights(entry.path))}
        )
        # Named after the whole version: engines that are given one path take each other's KV (NIXL's hash has the path,
        # and nothing of the weights).
        path = locate_copy(manifest.digest, with_weights=False)
        copy = fetch_into_cache(path, light, self._build_reader(manifest, "fetch"), None)
        with _refusing(copy):
            check_without_weights(path, [entry.path for entry in manifest.files])
        keep_manifest(path, manifest)
        return FetchedVersion(path, manifest.name, manifest.version, manifest, copy)

    def _build_reader(self, manifest: Manifest, operation: Operation) -> ReadPart:
        """Parts from the store, whose bytes are counted; of a base that the store does not hold, from the base."""

        @cache
        def find_base() -> Path:
            assert manifest.base is not None
            return find_model_folder(Path(manifest.base.name), manifest.base.revision)

        def read(entry: FileEntry, index: int) -> object:
            if entry.base_path is None or manifest.is_stored(entry):
                part = self._storage.read_buffer(layout.blob_path(entry.parts[index]))
                if part is not None:
                    count_bytes(operation, memoryview(part).nbytes)
                return part
            return read_at(find_base() / entry.base_path, manifest, entry, index)

        return read

    def _check_new_version(self, name: str, version: str) -> None:
        check_name(version, "Version")
        if version == LATEST or self._find_alias(name, version) is not None:
            raise ConfigError(f"Version {version!r} is an alias. Choose another version, or none for the next number.")
        refuse_existing(self._storage, name, version)

    def _check_alias(self, name: str, alias: str) -> None:
        check_name(name, "Model name")
        check_name(alias, "Alias")
        if alias.isdecimal() or self._has_version(name, alias):
            raise ConfigError(f"Alias {alias!r} is, or will be, a version. Choose a word, such as 'production'.")

    def _has_version(self, name: str, version: str) -> bool:
        return self._storage.find_size(layout.manifest_path(name, version)) is not None

    def _find_newest(self, name: str) -> str:
        manifests: list[Manifest] = []
        problem: RegistryError = self._describe_missing(name, None)
        for version in self.list_versions(name):
            try:
                manifests.append(self.load_manifest(f"{name}@{version}"))
            except RegistryError as error:  # damaged, or of another format: no reason to hide the others
                problem = error
        if not manifests:
            raise problem
        return max(manifests, key=lambda known: (known.published_at, layout.natural_order(known.version))).version

    def _find_alias(self, name: str, alias: str) -> str | None:
        record = read_alias(self._storage, name, alias)
        return None if record is None else record.version

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


@contextmanager
def _refusing(copy: CachedCopy | None = None) -> Iterator[None]:
    """Hashes say that the bytes are the published ones; what is checked in this block, that they may be loaded."""
    try:
        yield
    except CheckpointError as error:
        if copy is not None:
            copy.release()
        raise IntegrityError(f"Published by something else than swiftkv: {error}") from None
