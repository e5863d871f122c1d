"""What operations on versions take and move, as metrics of the process that does them. Moves and verifies nothing.

Called by: registry/registry.py, registry/files.py, registry/streaming.py. Calls: metrics.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from swiftkv.errors import IntegrityError
from swiftkv.metrics import count, observe

Operation = Literal["publish", "fetch", "pull", "stream", "verify"]


@contextmanager
def metered(operation: Operation) -> Iterator[None]:
    """A block, or a function, that is one operation: its seconds if it succeeds, one failure if bytes differ from the
    manifest."""
    started = time.perf_counter()
    try:
        yield
    except IntegrityError:
        count("swiftkv_registry_verification_failures_total", 1, operation=operation)
        raise
    observe("swiftkv_registry_seconds", time.perf_counter() - started, operation=operation)


def count_bytes(operation: Operation, num_bytes: int) -> None:
    """A part has gone into the store or come out of it."""
    if num_bytes:  # a damaged object may be empty, and Ray's counters refuse 0
        count("swiftkv_registry_bytes_total", num_bytes, operation=operation)
