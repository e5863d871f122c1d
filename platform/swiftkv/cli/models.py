"""`swiftkv models list | show | diff | verify | pull | gc`: the registry on the terminal.

Holds no rules of the registry. Errors rise; cli/main.py turns them into a message and an exit status.
Called by: cli/main.py. Calls: registry/registry.py.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swiftkv.cli.registry import (
    Reference,
    Store,
    build_table,
    describe_bytes,
    describe_size,
    open_registry,
    print_table,
    show_progress,
)
from swiftkv.errors import RegistryError

if TYPE_CHECKING:
    from swiftkv.registry.evaluations import EvaluationRecord, GateResult
    from swiftkv.registry.manifest import Base, Manifest

_LONGEST_LIST = 8

models_app = typer.Typer(help="Look into the registry.", no_args_is_help=True)


@models_app.command("list")
def list_models(store: Store = None) -> None:
    """Every version in the registry, with its size, aliases and age."""
    registry = open_registry(store)
    rows = []
    for name in registry.list_models():
        aliases = registry.list_aliases(name)
        for version in registry.list_versions(name):
            own = ", ".join(alias for alias, target in aliases.items() if target == version)
            try:
                manifest = registry.load_manifest(f"{name}@{version}")
            except RegistryError as error:  # one bad manifest hides no others
                rows.append((f"{name}@{version}", own, "unreadable", "", _escape(str(error))))
                continue
            when = f"{manifest.published_at:%Y-%m-%d %H:%M}"
            rows.append((f"{name}@{version}", own, describe_size(manifest), when, manifest.publisher))
    if not rows:
        typer.echo(f"No models in {registry.location}. Publish one: swiftkv publish FOLDER --name NAME")
        return
    table = build_table("version", "aliases", "size", "published (UTC)", "by")
    for row in rows:
        table.add_row(*row)
    print_table(table)


@models_app.command("show")
def show_model(reference: Reference, store: Store = None) -> None:
    """Where a version came from and how good it is."""
    registry = open_registry(store)
    manifest = registry.load_manifest(reference)
    aliases = registry.list_aliases(manifest.name)
    own = ", ".join(alias for alias, version in aliases.items() if version == manifest.version)
    table = build_table(f"{manifest.name}@{manifest.version}", "")
    records = registry.list_evaluations(f"{manifest.name}@{manifest.version}")
    for title, values in _list_sections(manifest, own, records):
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]", "" if values else "not recorded")
        for key, value in _flatten(values):
            table.add_row(_escape(f"  {key}"), _escape(_describe_value(value)))
    print_table(table)


@models_app.command("verify")
def verify_model(reference: Reference, store: Store = None) -> None:
    """Read every byte of a version and compare it with its manifest."""
    registry = open_registry(store)
    with show_progress(f"verifying {reference}") as on_progress:
        manifest = registry.verify(reference, on_progress)
    of_base = sum(entry.size_bytes for entry in manifest.files if not manifest.is_stored(entry))
    left_out = f", but for {describe_bytes(of_base)} that the base holds" if of_base else ""
    size = describe_bytes(manifest.total_bytes - of_base)
    typer.echo(f"verified {manifest.name}@{manifest.version} {size}{left_out}, digest {manifest.digest}")


@models_app.command("pull")
def pull_model(
    reference: Reference,
    folder: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.", show_default=False)],
    store: Store = None,
) -> None:
    """Write a version's files into a folder, every byte verified; a pull that was broken off goes on."""
    with show_progress(f"pulling {reference}") as on_progress:
        manifest = open_registry(store).pull(reference, folder, on_progress)
    typer.echo(f"pulled {manifest.name}@{manifest.version} {describe_size(manifest)} into {folder}")


@models_app.command("diff")
def diff_models(
    first: Annotated[str, typer.Argument(metavar="A", help="NAME[@VERSION|@ALIAS].", show_default=False)],
    second: Annotated[str, typer.Argument(metavar="B", help="NAME[@VERSION|@ALIAS].", show_default=False)],
    store: Store = None,
) -> None:
    """What differs between two versions, and how many bytes they share."""
    registry = open_registry(store)
    manifests = [registry.load_manifest(reference) for reference in (first, second)]
    table = build_table("", *(f"{manifest.name}@{manifest.version}" for manifest in manifests))
    sections = [
        _list_sections(manifest, "", registry.list_evaluations(f"{manifest.name}@{manifest.version}"))
        for manifest in manifests
    ]
    for (title, of_first), (_, of_second) in zip(*sections, strict=True):
        flat = [{key: _describe_value(value) for key, value in _flatten(part)} for part in (of_first, of_second)]
        keys = [key for key in flat[0] | flat[1] if flat[0].get(key) != flat[1].get(key)]
        if keys:
            table.add_section()
            table.add_row(f"[bold]{title.split(',')[0]}[/bold]")
        for key in keys:
            table.add_row(*(_escape(text) for text in (f"  {key}", flat[0].get(key, "–"), flat[1].get(key, "–"))))
    print_table(table)
    blobs = [manifest.stored_blobs for manifest in manifests]
    shared = sum(size for blob, size in blobs[0].items() if blob in blobs[1])
    only = [describe_bytes(sum(own.values()) - shared) for own in blobs]
    typer.echo(f"shared: {describe_bytes(shared)}; only in {first}: {only[0]}; only in {second}: {only[1]}")


@models_app.command("gc")
def collect_models(
    keep: Annotated[int, typer.Option(help="Newest versions of each model that stay.", min=1, show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    store: Store = None,
) -> None:
    """Remove old versions that no alias means or would roll back to, then bytes that no version needs."""
    registry = open_registry(store)
    with show_progress("removing") as on_progress:
        collection = registry.collect(keep, dry_run, None if dry_run else on_progress)
    for reference in collection.versions:
        typer.echo(f"{'would remove' if dry_run else 'removed'} {reference}")
    verb = "would free" if dry_run else "freed"
    typer.echo(f"{verb} {describe_bytes(collection.blob_bytes)} in {collection.num_blobs:,} blobs")


def _list_sections(
    manifest: "Manifest", aliases: str, records: "list[EvaluationRecord]"
) -> list[tuple[str, dict[str, Any]]]:
    base = manifest.base
    version = {
        "published (UTC)": f"{manifest.published_at:%Y-%m-%d %H:%M:%S}",
        "by": manifest.publisher,
        "code": manifest.code_version,
        "aliases": aliases or "none",
        "digest": manifest.digest,
        **({} if base is None else {"base": _describe_base(base, manifest.own_bytes)}),
    }
    recipe = manifest.recipe
    files = {
        entry.path: f"{describe_bytes(entry.size_bytes)}, SHA-256 {entry.sha256[:16]}…" for entry in manifest.files
    }
    return [
        ("version", version),
        ("teacher", manifest.teacher or {}),
        ("spec", dict(manifest.spec)),
        ("recipe", {} if recipe is None else {"(SHA-256)": recipe.sha256, **recipe.content}),
        ("data", manifest.data or {}),
        ("training", manifest.training or {}),
        ("evaluation", _describe_evaluations(manifest, records)),
        (f"files, {describe_size(manifest)}", files),
    ]


def _describe_base(base: "Base", own_bytes: int) -> str:
    where = "its files are stored once for all versions" if base.stored else "its files are taken from there"
    revision = "" if base.revision is None else f" at {base.revision}"
    return f"{base.name}{revision}; {where}; own files: {describe_bytes(own_bytes)}"


def _describe_evaluations(manifest: "Manifest", records: "list[EvaluationRecord]") -> dict[str, Any]:
    """What was measured before publishing, and after it, newest last."""
    from pydantic import ValidationError

    from swiftkv.registry.evaluations import GateResult

    values: dict[str, Any] = dict(manifest.evaluation or {})
    with suppress(KeyError, ValidationError):  # whoever publishes may put anything into a provenance
        values["gate"] = _describe_gate(GateResult.model_validate(values["gate"]))
    for record in records:
        when = f"{record.evaluated_at:%Y-%m-%d %H:%M:%S}"
        gate = {} if record.gate is None else {"gate": _describe_gate(record.gate)}
        values[when] = {"by": record.evaluated_by, **record.figures, **gate}
    return values


def _describe_gate(gate: "GateResult") -> dict[str, str]:
    limits = {limit.limit: f"{_describe_value(limit.found)}, {_tell(limit.passed)}" for limit in gate.limits}
    return {f"{gate.gate} ({gate.sha256[:8]})": _tell(gate.passed), **limits}


def _tell(passed: bool) -> str:
    return "passed" if passed else "NOT PASSED"


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _describe_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list) and len(value) > _LONGEST_LIST:
        first, last = _describe_value(value[0]), _describe_value(value[-1])
        return f"{len(value)} values, from {first} to {last}"
    if isinstance(value, list):
        return ", ".join(_describe_value(item) for item in value)
    return "none" if value is None else str(value)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
