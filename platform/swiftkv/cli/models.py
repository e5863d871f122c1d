"""`swiftkv publish` and `swiftkv models list | show | verify`: the registry on the terminal.

Holds no rules of the registry. Errors rise; cli/main.py turns them into a message and an exit status.
Called by: cli/main.py. Calls: registry/registry.py.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swiftkv.config import home, load_yaml, parse_settings
from swiftkv.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from swiftkv.registry.files import OnProgress
    from swiftkv.registry.manifest import Manifest, Provenance
    from swiftkv.registry.registry import Registry

_LONGEST_LIST = 8

Store = Annotated[
    str | None,
    typer.Option(help="Registry: a folder, or a bucket (s3://…, gs://…, az://…).  [default: the home's registry]"),
]
Reference = Annotated[str, typer.Argument(metavar="NAME[@VERSION|@ALIAS]", show_default=False)]

models_app = typer.Typer(help="Look into the registry.", no_args_is_help=True)


def publish(
    folder: Annotated[Path, typer.Argument(help="Folder of a SwiftKV checkpoint.", show_default=False)],
    name: Annotated[str, typer.Option(help="Model name in the registry.", show_default=False)],
    version: Annotated[str | None, typer.Option(help="Version; the next whole number if not given.")] = None,
    alias: Annotated[str | None, typer.Option(help="Alias to move to the version, such as production.")] = None,
    provenance: Annotated[
        Path | None,
        typer.Option(help="YAML or JSON with any of: teacher, recipe, data, training, evaluation."),
    ] = None,
    store: Store = None,
) -> None:
    """Publish a checkpoint folder as a version that never changes."""
    from swiftkv.families import FAMILIES

    registry = _open_registry(store)
    origin = None if provenance is None else _load_provenance(provenance)
    with _progress_bar(f"publishing {name}") as on_progress:
        manifest = registry.publish(
            folder,
            name,
            version=version,
            provenance=origin,
            alias=alias,
            on_progress=on_progress,
            allowed_model_types=FAMILIES.keys(),
        )
    moved = f", alias {alias}" if alias else ""
    typer.echo(f"published {manifest.name}@{manifest.version} {_describe_size(manifest)}{moved} in {registry.location}")


@models_app.command("list")
def list_models(store: Store = None) -> None:
    """Every version in the registry, with its size, aliases and age."""
    registry = _open_registry(store)
    rows = []
    for name in registry.list_models():
        aliases = registry.list_aliases(name)
        for version in registry.list_versions(name):
            manifest = registry.load_manifest(f"{name}@{version}")
            own = ", ".join(alias for alias, target in aliases.items() if target == version)
            when = f"{manifest.published_at:%Y-%m-%d %H:%M}"
            rows.append((f"{name}@{version}", own, _describe_size(manifest), when, manifest.publisher))
    if not rows:
        typer.echo(f"No models in {registry.location}. Publish one: swiftkv publish FOLDER --name NAME")
        return
    table = _build_table("version", "aliases", "size", "published (UTC)", "by")
    for row in rows:
        table.add_row(*row)
    _print(table)


@models_app.command("show")
def show_model(reference: Reference, store: Store = None) -> None:
    """Where a version came from and how good it is."""
    registry = _open_registry(store)
    manifest = registry.load_manifest(reference)
    aliases = registry.list_aliases(manifest.name)
    own = ", ".join(alias for alias, version in aliases.items() if version == manifest.version)
    table = _build_table(f"{manifest.name}@{manifest.version}", "")
    for title, values in _list_sections(manifest, own):
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]", "" if values else "not recorded")
        for key, value in _flatten(values):
            table.add_row(_escape(f"  {key}"), _escape(_describe_value(value)))
    _print(table)


@models_app.command("verify")
def verify_model(reference: Reference, store: Store = None) -> None:
    """Read every byte of a version and compare it with its manifest."""
    registry = _open_registry(store)
    with _progress_bar(f"verifying {reference}") as on_progress:
        manifest = registry.verify(reference, on_progress)
    typer.echo(f"verified {manifest.name}@{manifest.version} {_describe_size(manifest)}, digest {manifest.digest}")


def _open_registry(store: str | None) -> "Registry":
    # obstore and the manifest's models load here, so that `swiftkv --help` need not wait for them.
    from swiftkv.registry.registry import Registry

    return Registry(home() / "registry" if store is None else store)


def _load_provenance(path: Path) -> "Provenance":
    from swiftkv.registry.manifest import Provenance

    # YAML 1.1 reads JSON's 1e-05 as a string, so JSON has its own reader.
    if path.suffix != ".json" or not path.is_file():
        return load_yaml(path, Provenance)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}.") from None
    return parse_settings(values, Provenance, str(path))


@contextmanager
def _progress_bar(title: str) -> "Iterator[OnProgress]":
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns, TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _list_sections(manifest: "Manifest", aliases: str) -> list[tuple[str, dict[str, Any]]]:
    version = {
        "published (UTC)": f"{manifest.published_at:%Y-%m-%d %H:%M:%S}",
        "by": manifest.publisher,
        "code": manifest.code_version,
        "aliases": aliases or "none",
        "digest": manifest.digest,
    }
    recipe = manifest.recipe
    files = {
        entry.path: f"{_describe_bytes(entry.size_bytes)}, SHA-256 {entry.sha256[:16]}…" for entry in manifest.files
    }
    return [
        ("version", version),
        ("teacher", manifest.teacher or {}),
        ("spec", dict(manifest.spec)),
        ("recipe", {} if recipe is None else {"(SHA-256)": recipe.sha256, **recipe.content}),
        ("data", manifest.data or {}),
        ("training", manifest.training or {}),
        ("evaluation", manifest.evaluation or {}),
        (f"files, {_describe_size(manifest)}", files),
    ]


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


def _describe_size(manifest: "Manifest") -> str:
    return _describe_bytes(manifest.total_bytes)


def _describe_bytes(num_bytes: int) -> str:
    from rich.filesize import decimal

    return decimal(num_bytes)


def _build_table(*headers: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _print(table: "Table") -> None:
    from rich.console import Console

    Console().print(table)
