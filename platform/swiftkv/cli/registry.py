"""What the registry's commands share: the store's option, the open registry, progress.

Called by: cli/publish.py, cli/models.py, cli/evaluate.py. Calls: registry/registry.py.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swiftkv.config import home, load_yaml, parse_settings
from swiftkv.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from swiftkv.registry.files import OnProgress
    from swiftkv.registry.manifest import Manifest, Provenance
    from swiftkv.registry.registry import Registry

Store = Annotated[
    str | None,
    typer.Option(help="Registry: a folder, or a bucket (s3://…, gs://…, az://…).", show_default="the home's registry"),
]
Reference = Annotated[str, typer.Argument(metavar="NAME[@VERSION|@ALIAS]", show_default=False)]


def open_registry(store: str | None) -> "Registry":
    """The registry at `store`, or the home's."""
    # obstore and the manifest's models load here, so that `swiftkv --help` need not wait for them.
    from swiftkv.registry.registry import Registry

    return Registry(home() / "registry" if store is None else store)


def load_provenance(path: Path) -> "Provenance":
    """A run's record of where its student came from. Raises: ConfigError if it is none."""
    from swiftkv.registry.manifest import Provenance

    # YAML 1.1 reads JSON's 1e-05 as a string, so JSON has its own reader.
    if path.suffix != ".json" or not path.is_file():
        return load_yaml(path, Provenance)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise ConfigError(f"{path}: not valid JSON: {error}.") from None
    return parse_settings(values, Provenance, str(path))


def tell_waiting(who: str) -> None:
    """Say why nothing happens."""
    typer.echo(f"waiting: {who} removes what is no longer needed from the store", err=True)


@contextmanager
def show_progress(title: str) -> "Iterator[OnProgress]":
    """A bar of bytes on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns, TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def describe_size(manifest: "Manifest") -> str:
    """Bytes of a version, for people."""
    return describe_bytes(manifest.total_bytes)


def describe_bytes(num_bytes: int) -> str:
    """Bytes, for people."""
    from rich.filesize import decimal

    return decimal(num_bytes)


def build_table(*headers: str) -> "Table":
    """An empty table in the commands' form."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def print_table(table: "Table") -> None:
    """To the terminal."""
    from rich.console import Console

    Console().print(table)
