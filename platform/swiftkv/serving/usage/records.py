"""What remains of a request for the bill: who asked, which version answered, tokens, charge, how it ended. No text.

Called by: gateway/gateway.py, usage/writer.py, usage/summing.py. Calls: pyarrow.
"""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq

FOLDER = "usage"
"""Below the store."""


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """One request of a known tenant."""

    id: str
    """Unique: a record that is there twice counts once."""
    request_id: str
    """As the client was told."""
    ended_at: datetime
    """UTC."""
    tenant: str
    model: str
    version: str
    """Serve application; `-` if none was asked."""
    route: str
    status: int
    reason: str | None
    prompt_tokens: int
    """Cached ones included."""
    cached_tokens: int
    completion_tokens: int
    queue_s: float | None
    ttft_s: float | None
    tpot_s: float | None
    total_s: float
    charge: Decimal | None
    """None: the model has no prices."""
    currency: str | None
    """ISO 4217 code of the charge."""

    @property
    def tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("request_id", pa.string()),
        ("ended_at", pa.timestamp("ms", tz="UTC")),
        ("tenant", pa.string()),
        ("model", pa.string()),
        ("version", pa.string()),
        ("route", pa.string()),
        ("status", pa.int64()),
        ("reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("cached_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("queue_s", pa.float64()),
        ("ttft_s", pa.float64()),
        ("tpot_s", pa.float64()),
        ("total_s", pa.float64()),
        # Not a float: a bill is exactly the sum of its requests, and prices have up to 12 places for one token.
        ("charge", pa.decimal128(38, 12)),
        ("currency", pa.string()),
    ]
)
"""Of every file."""

_LATER = ("charge", "currency")
"""Columns that files of older gateways lack."""


def encode(records: Sequence[UsageRecord]) -> bytes:
    """The records as one Parquet file."""
    table = pa.Table.from_pylist([asdict(record) for record in records], schema=SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def decode(content: bytes) -> pa.Table:
    """The records of a Parquet file; columns that it lacks because it is older are null.

    Raises: pyarrow.ArrowException, OSError or ValueError if it is none of ours.
    """
    table = pq.read_table(io.BytesIO(content))
    for name in _LATER:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table), SCHEMA.field(name).type))
    return table.cast(SCHEMA)


def name_folder(at: datetime) -> str:
    """Where records that are written at that time go: a folder an hour."""
    return f"{FOLDER}/{at.astimezone(UTC):%Y-%m-%d/%H}"
