"""Sums usage records of a time by any of their columns. Each record counts once, however often it is there.

Called by: cli/usage.py. Calls: usage/records.py, registry/storage.py.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from swiftkv.errors import ConfigError, RegistryError
from swiftkv.registry.storage import Storage
from swiftkv.serving.usage.records import FOLDER, SCHEMA, decode

COLUMNS = ("tenant", "model", "version", "route", "status", "reason", "day", "hour")
"""What sums can be by."""
SUMMED = ("prompt_tokens", "cached_tokens", "completion_tokens")

_SLACK = timedelta(hours=1)
"""How much later than it ended a request may have been written: as long as a store may be away."""
_NUM_THREADS = 16


def read_usage(
    storage: Storage, since: datetime, until: datetime, on_progress: Callable[[int, int], None] | None = None
) -> pa.Table:
    """The records of requests that ended in [since, until), each once.

    Raises: RegistryError if the store cannot be read, or a file in it is none of ours.
    """
    hours = list_hours(since, until)
    wanted = [
        f"{FOLDER}/{day}/{path}"
        for day in sorted({hour.partition("/")[0] for hour in hours})
        for path in storage.list_files(f"{FOLDER}/{day}")
        if f"{day}/{path.partition('/')[0]}" in hours
    ]
    tables = []
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        for number, table in enumerate(threads.map(lambda path: _read(storage, path), wanted), 1):
            tables.append(table)
            if on_progress is not None:
                on_progress(number, len(wanted))
    records = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
    ended = records["ended_at"]
    inside = pc.and_(pc.greater_equal(ended, pa.scalar(since)), pc.less(ended, pa.scalar(until)))
    return _drop_copies(records.filter(inside))


def list_hours(since: datetime, until: datetime) -> set[str]:
    """Names of the folders in which records of that time can be. Raises: ConfigError if there is no such time."""
    if since >= until:
        raise ConfigError(f"--from ({since.isoformat()}) is not before --to ({until.isoformat()}).")
    hour = since.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    found = set()
    while hour < until + _SLACK:
        found.add(f"{hour:%Y-%m-%d/%H}")
        hour += timedelta(hours=1)
    return found


def sum_usage(records: pa.Table, by: Sequence[str]) -> list[dict[str, Any]]:
    """Requests, tokens and charges by these columns, one row for each combination, sorted by them.

    A row's `charges` are exact sums by currency: two currencies are never added together.

    Raises: ConfigError for a column that there is not.
    """
    if unknown := [column for column in by if column not in COLUMNS]:
        raise ConfigError(f"--by {','.join(unknown)}: there is {', '.join(COLUMNS)}.")
    for column, form in (("day", "%Y-%m-%d"), ("hour", "%Y-%m-%d %H:00")):
        if column in by:
            records = records.append_column(column, pc.strftime(records["ended_at"], form))
    sums = [("id", "count"), *((column, "sum") for column in (*SUMMED, "charge"))]
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for part in records.group_by([*by, "currency"]).aggregate(sums).to_pylist():
        named = {column: part[column] for column in by}
        empty = {**named, "requests": 0, **dict.fromkeys(SUMMED, 0), "charges": {}}
        row = rows.setdefault(tuple(named.values()), empty)
        row["requests"] += part["id_count"]
        for column in SUMMED:
            row[column] += part[f"{column}_sum"] or 0
        if part["currency"] is not None:
            row["charges"][part["currency"]] = part["charge_sum"]
    return sorted(rows.values(), key=lambda row: [str(row[column]) for column in by])


def _read(storage: Storage, path: str) -> pa.Table:
    content = storage.read(path)
    if content is None:
        return SCHEMA.empty_table()  # somebody has just removed it
    try:
        return decode(content)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RegistryError(f"{storage.location}/{path} holds no usage records: {error}") from error


def _drop_copies(records: pa.Table) -> pa.Table:
    numbered = records.append_column("place", pa.array(range(len(records)), pa.int64()))
    first = numbered.group_by("id").aggregate([("place", "min")])["place_min"]
    return records.take(first.combine_chunks().sort())
