"""`swiftkv publish | promote | rollback`: what changes the registry.

Holds no rules of the registry. Errors rise; cli/main.py turns them into a message and an exit status.
Called by: cli/main.py. Calls: registry/registry.py; model/delta.py for a version that shares its teacher's files.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swiftkv.cli.registry import (
    Reference,
    Store,
    describe_size,
    load_provenance,
    open_registry,
    show_progress,
    tell_waiting,
)
from swiftkv.config import home
from swiftkv.errors import ConfigError

if TYPE_CHECKING:
    from swiftkv.registry.manifest import Base, Manifest


@dataclass(frozen=True)
class _Source:
    """The folder to publish, and which of its files are a base's."""

    folder: Path
    base: "Base | None" = None
    base_paths: dict[str, str] = field(default_factory=dict)


def publish(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder of a SwiftKV checkpoint or of `swiftkv delta save`, or a model of the hub.", show_default=False
        ),
    ],
    name: Annotated[str, typer.Option(help="Model name in the registry.", show_default=False)],
    version: Annotated[str | None, typer.Option(help="Version; the next whole number if not given.")] = None,
    provenance: Annotated[
        Path | None,
        typer.Option(help="YAML or JSON with any of: teacher, recipe, data, training, evaluation."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The teacher, a folder or a model of the hub: its files are stored once for all versions of it, and "
            "this version costs only its new tensors.",
            show_default="what the delta names",
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit on the hub, of the base or else of the model.")] = None,
    reference_base: Annotated[
        bool,
        typer.Option(
            "--reference-base", help="Do not store the base's files: name them, and take them from the hub or folder."
        ),
    ] = False,
    store: Store = None,
) -> None:
    """Publish a checkpoint as a version that never changes."""
    from swiftkv.families import FAMILIES

    registry = open_registry(store)
    origin = None if provenance is None else load_provenance(provenance)
    with _open_source(folder, base, revision, reference_base) as source, show_progress(f"publishing {name}") as bar:
        manifest = registry.publish(
            source.folder,
            name,
            version=version,
            provenance=origin,
            base=source.base,
            base_paths=source.base_paths,
            on_progress=bar,
            on_wait=tell_waiting,
            allowed_model_types=FAMILIES.keys(),
        )
    shared = _describe_base(manifest)
    typer.echo(f"published {manifest.name}@{manifest.version} {describe_size(manifest)}{shared} in {registry.location}")


def promote(
    reference: Reference,
    alias: Annotated[str, typer.Argument(help="Such as production.", show_default=False)],
    force: Annotated[
        str | None, typer.Option(metavar="WHY", help="Promote without a passed gate; the history keeps why.")
    ] = None,
    store: Store = None,
) -> None:
    """Make an alias mean a version that has passed its gate."""
    if force is not None and not force.strip():
        raise ConfigError('--force: say why, as in --force "hotfix of the tokenizer".')
    manifest = open_registry(store).promote(reference, alias, force, tell_waiting)
    typer.echo(f"{manifest.name}@{alias} is now version {manifest.version}")


def rollback(
    name: Annotated[str, typer.Argument(help="Model name.", show_default=False)],
    alias: Annotated[str, typer.Argument(help="Such as production.", show_default=False)],
    store: Store = None,
) -> None:
    """Make an alias mean what it meant before; the history is kept."""
    version = open_registry(store).rollback(name, alias, tell_waiting)
    typer.echo(f"{name}@{alias} is now version {version}")


@contextmanager
def _open_source(folder: Path, base: str | None, revision: str | None, reference_base: bool) -> Iterator[_Source]:
    from swiftkv.hub import find_model_folder

    is_delta = (folder / "delta.json").is_file()
    if base is None and not is_delta:
        if reference_base:
            raise ConfigError("--reference-base: which base? Give --base, or a folder of `swiftkv delta save`.")
        yield _Source(find_model_folder(folder, revision))
        return
    # These load torch, which a whole folder is published without.
    from swiftkv.model.delta import Base as DeltaBase
    from swiftkv.model.delta import load_delta_record, restore_delta, save_delta
    from swiftkv.registry.manifest import Base

    home().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home(), prefix="publishing-") as scratch:
        if is_delta:
            record = load_delta_record(folder)
            base_folder = find_model_folder(Path(base or record.base_name), revision or record.base_revision)
            if base is not None:
                given = DeltaBase.from_folder(base_folder)
                record = record.model_copy(update={"base_name": given.name, "base_revision": given.revision})
        else:
            base_folder = find_model_folder(Path(str(base)), revision)
            delta = Path(scratch) / "delta"
            save_delta(folder, delta, DeltaBase.from_folder(base_folder))
            folder, record = delta, load_delta_record(delta)
        base_paths = restore_delta(folder, base_folder, Path(scratch) / "whole", links=True)
        told = Base(name=record.base_name, revision=record.base_revision, stored=not reference_base)
        yield _Source(Path(scratch) / "whole", told, base_paths)


def _describe_base(manifest: "Manifest") -> str:
    if manifest.base is None:
        return ""
    how = "sharing the files" if manifest.base.stored else "beside a reference to the files"
    return f", {how} of {manifest.base.name}"
