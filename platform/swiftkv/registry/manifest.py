"""What the registry knows about one version: files and hashes, shape, origin, training, quality.

manifest.schema.json beside this file is its JSON schema, which `python -m swiftkv.registry.manifest` prints.
Reads and writes no storage.
Called by: the other files of registry/, cli/models.py, and whoever publishes (Provenance).
"""

import getpass
import hashlib
import json
import os
import socket
import subprocess
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

import swiftkv
from swiftkv.config import StrictModel
from swiftkv.errors import IntegrityError, RegistryError
from swiftkv.registry.layout import is_safe_path

FORMAT = 2
"""Manifest format that this code writes and reads."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Provenance(StrictModel):
    """Where a checkpoint came from and how good it is, as its maker says; every part may be absent."""

    teacher: dict[str, JsonValue] | None = None
    """The model it was distilled from: name or folder, revision, hashes."""
    recipe: dict[str, JsonValue] | None = None
    """The resolved recipe of the distillation; the manifest adds its SHA-256."""
    data: dict[str, JsonValue] | None = None
    """What it was trained on: fingerprint, settings and hashes of the sources, counts."""
    training: dict[str, JsonValue] | None = None
    """Figures of the training run: steps, tokens, final loss, seconds, workers."""
    evaluation: dict[str, JsonValue] | None = None
    """Held-out figures: perplexities, agreement with the teacher, KL, task scores."""


class FileEntry(StrictModel):
    """One file of a version, and the blobs that hold its bytes."""

    path: str
    """Relative to the version's folder, parts joined by `/`."""
    size_bytes: int = Field(ge=0)
    sha256: Sha256
    """Of the whole file."""
    parts: tuple[Sha256, ...]
    """SHA-256 of each `part_bytes` of the file in order, the last one shorter; the names of the blobs."""
    base_path: str | None = None
    """The file of the base that this is; None: the version's own."""

    @field_validator("path", "base_path")
    @classmethod
    def _refuse_unsafe(cls, path: str | None) -> str | None:
        if path is not None and not is_safe_path(path):
            raise ValueError(f"unsafe file path {path!r}; a file must lie inside its version's folder")
        return path


class Base(StrictModel):
    """The teacher whose files are part of the version."""

    name: str
    """Of the Hugging Face hub, or a folder."""
    revision: str | None = None
    """Commit on the hub."""
    stored: bool
    """Whether the store holds its files, once for all versions; else they are taken from the hub, and compared."""


class Recipe(StrictModel):
    """The recipe a version was distilled with."""

    content: dict[str, JsonValue]
    sha256: str
    """SHA-256 of the content as JSON with sorted keys and no spaces."""


class Manifest(StrictModel):
    """The record that makes a version exist. Written once, after every file that it lists."""

    # A diverged run's NaN must stay visible: JSON has none, and pydantic would write null.
    model_config = ConfigDict(ser_json_inf_nan="strings")

    format: Literal[2] = 2
    name: str
    version: str
    published_at: datetime
    """UTC, by the publisher's clock."""
    publisher: str
    """user@host."""
    code_version: str
    """Version of this package, and the commit where it runs from a git checkout."""
    part_bytes: int = Field(gt=0)
    """Files are cut into parts of this size."""
    files: tuple[FileEntry, ...] = Field(min_length=1)
    """Sorted by path."""
    base: Base | None = None
    """None: every file is the version's own."""
    spec: dict[str, JsonValue]
    """The shape in config.json: sizes, layers, KV layers, group size."""
    teacher: dict[str, JsonValue] | None = None
    recipe: Recipe | None = None
    data: dict[str, JsonValue] | None = None
    training: dict[str, JsonValue] | None = None
    evaluation: dict[str, JsonValue] | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size_bytes for entry in self.files)

    @property
    def digest(self) -> str:
        """SHA-256 over paths, sizes and hashes of the files: equal exactly when the files are."""
        lines = [f"{self.part_bytes}"]
        lines += [f"{entry.path}\0{entry.size_bytes}\0{entry.sha256}\0{','.join(entry.parts)}" for entry in self.files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def stored_blobs(self) -> dict[str, int]:
        """The blobs that the store must hold: hash -> bytes."""
        return {
            part: self.measure_part(entry, index)
            for entry in self.files
            if self.is_stored(entry)
            for index, part in enumerate(entry.parts)
        }

    @property
    def own_bytes(self) -> int:
        """Bytes of the files that are not the base's."""
        return sum(entry.size_bytes for entry in self.files if entry.base_path is None)

    def is_stored(self, entry: FileEntry) -> bool:
        """Whether the store holds the file's blobs; else the base does."""
        return entry.base_path is None or self.base is None or self.base.stored

    def measure_part(self, entry: FileEntry, index: int) -> int:
        """Bytes of a file's part."""
        return min(self.part_bytes, entry.size_bytes - index * self.part_bytes)

    @model_validator(mode="after")
    def _count_parts(self) -> "Manifest":
        for entry in self.files:
            needed = -(-entry.size_bytes // self.part_bytes)
            if len(entry.parts) != needed:
                raise ValueError(f"{entry.path}: {len(entry.parts)} parts, where its size needs {needed}")
            if entry.base_path is not None and self.base is None:
                raise ValueError(f"{entry.path}: a file of the base, where no base is named")
        return self

    def to_json(self) -> bytes:
        """The bytes of `manifest.json`."""
        return self.model_dump_json(indent=1).encode() + b"\n"


def parse_manifest(content: bytes, name: str, version: str) -> Manifest:
    """The manifest that `manifest.json` of this version holds.

    Raises: IntegrityError if it is no manifest, is another version's, or names a file outside its folder;
    RegistryError if a newer format wrote it.
    """
    where = f"manifest.json of {name}@{version}"
    try:
        values: Any = json.loads(content)
    except ValueError as error:
        raise IntegrityError(f"{where}: not JSON ({error}). Publish the version again under a new number.") from None
    found = values.get("format") if isinstance(values, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise RegistryError(f"{where}: format {found}, but this swiftkv reads {FORMAT}. Install a newer swiftkv.")
    if isinstance(found, int) and found < FORMAT:
        raise RegistryError(f"{where}: format {found}, written before 0.5. Publish the folder again.")
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise IntegrityError(f"{where}: damaged, or not written by swiftkv: {problems}.") from None
    if (manifest.name, manifest.version) != (name, version):
        raise IntegrityError(
            f"{where}: it is the manifest of {manifest.name}@{manifest.version}. Versions cannot be copied or "
            "renamed inside a store: publish the folder again."
        )
    return manifest


def describe_recipe(content: dict[str, JsonValue]) -> Recipe:
    """The recipe with its hash."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return Recipe(content=content, sha256=hashlib.sha256(canonical).hexdigest())


def describe_publisher() -> str:
    """user@host of this process; the user id where the account has no name, as in some containers."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def describe_code() -> str:
    """Version of this package; from a git checkout of it, also the commit, `-dirty` if files differ."""
    package = Path(swiftkv.__file__).parent
    checkout = package.parents[1]
    # Installed into an environment that lies in some other project's checkout, git would name that project.
    if PurePosixPath(*package.parts[-2:]) != PurePosixPath("platform/swiftkv") or not (checkout / ".git").exists():
        return swiftkv.__version__
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return swiftkv.__version__
    return f"{swiftkv.__version__}+git.{result.stdout.strip()}"


if __name__ == "__main__":
    print(json.dumps(Manifest.model_json_schema(), indent=1))
