"""`swiftkv usage`: what tenants have used, from the records that gateways write to the store.

Called by: cli/main.py. Calls: serving/usage.
"""

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


def usage(
    store: Annotated[str, typer.Option(help="The gateway's usage_store: a folder, or a bucket's URL.")],
    by: Annotated[
        str,
        typer.Option(help="Columns, separated by commas: tenant, model, version, route, status, reason, day, hour."),
    ] = "tenant,model",
    since: Annotated[
        str | None,
        typer.Option("--from", help="First day or time (ISO 8601, UTC); a month ago otherwise."),
    ] = None,
    until: Annotated[str | None, typer.Option("--to", help="Day or time to stop before; now otherwise.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Sum requests, tokens and charges, these by currency."""
    # pyarrow takes a while to load, and other commands need none of it.
    from swiftkv.registry.storage import Storage
    from swiftkv.serving.usage.summing import read_usage, sum_usage

    now = datetime.now(UTC)
    begin = _read_time(since, "--from") if since else now - timedelta(days=30)
    end = _read_time(until, "--to") if until else now
    columns = [column.strip() for column in by.split(",") if column.strip()]
    console = Console()
    with console.status("reading usage records") as status:
        records = read_usage(
            Storage(store), begin, end, lambda done, of: status.update(f"reading usage records: {done} of {of} files")
        )
    rows = sum_usage(records, columns)
    if as_json:
        typer.echo(json.dumps(rows, default=_write_charge))
        return
    if not rows:
        console.print(f"no record of that time in {store}: is it the gateway's usage_store?", soft_wrap=True)
        return
    title = f"usage, {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC"
    console.print(_build_table(title, columns, rows))


def _build_table(title: str, columns: list[str], rows: list[dict[str, Any]]) -> Table:
    from swiftkv.serving.usage.summing import SUMMED

    currencies = sorted({currency for row in rows for currency in row["charges"]})
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for column in ("requests", *SUMMED, *currencies):
        table.add_column(column.replace("_tokens", ""), justify="right")
    for row in rows:
        counts = [f"{row[column]:,}" for column in ("requests", *SUMMED)]
        charges = [f"{row['charges'].get(currency, 0):,.6f}" for currency in currencies]
        table.add_row(*(str(row[column]) for column in columns), *counts, *charges)
    return table


def _write_charge(charge: Decimal) -> str:
    """With all its places: JSON's numbers are binary to most who read them."""
    return f"{charge:f}"


def _read_time(given: str, option: str) -> datetime:
    """Raises: typer.BadParameter if it is none."""
    try:
        time = datetime.fromisoformat(given)
    except ValueError:
        raise typer.BadParameter(f"{option} {given}: write it like 2026-11-01 or 2026-11-01T12:00.") from None
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time
