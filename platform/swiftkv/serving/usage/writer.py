"""Writes usage records in batches to the store, from a thread of its own: no request waits for it.

At least once: a batch has its name before it is written, and is written until the store has it, so that one that came
through unheard is written over by itself. A killed process loses what it has not written yet: the records of the last
`FLUSH_S`, and what a store that was away had not taken. How many tokens that are is known at every moment, and told to
the admission, which outlives the process. Sums nothing.
Called by: gateway/gateway.py. Calls: usage/records.py, registry/storage.py, metrics.
"""

import logging
import threading
from collections import deque
from datetime import UTC, datetime

from swiftkv.errors import RegistryError
from swiftkv.metrics import count, record
from swiftkv.registry.storage import Storage
from swiftkv.serving.usage.records import UsageRecord, encode, name_folder

FLUSH_S = 5.0
MAX_BATCH = 10_000
"""Records in a file."""
MAX_KEPT = 500_000
"""Records kept while the store does not answer; then the oldest batch is given up, and counted."""

logger = logging.getLogger(__name__)


class UsageWriter:
    """The records of one gateway process."""

    def __init__(self, store: str, gateway: str, flush_s: float = FLUSH_S) -> None:
        self._storage = Storage(store)
        self._gateway = gateway
        self._flush_s = flush_s
        self._lock = threading.Lock()
        self._new: list[UsageRecord] = []
        self._batches: deque[tuple[str, list[UsageRecord]]] = deque()
        self._num_batches = 0
        self._unwritten_tokens = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
        self._thread.start()

    @property
    def unwritten_tokens(self) -> int:
        """Of all records that are not in the store yet."""
        return self._unwritten_tokens

    def add(self, usage: UsageRecord) -> None:
        """Takes a record; it is in the store some seconds later."""
        self._note(usage.tokens)
        with self._lock:
            self._new.append(usage)

    def close(self) -> None:
        """Writes what there is, once, and ends."""
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(self._flush_s):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        self._cut()
        while self._batches:
            path, batch = self._batches[0]
            try:
                self._storage.write(path, encode(batch))
            except (RegistryError, OSError) as error:
                logger.warning("usage records are kept until the store answers: %s", error)
                break
            self._batches.popleft()
            count("swiftkv_usage_records_total", len(batch), outcome="written")
            self._note(-sum(usage.tokens for usage in batch))
        self._note(0)  # the gauge is there from the start

    def _cut(self) -> None:
        """Puts new records into batches, each with its name."""
        with self._lock:
            new, self._new = self._new, []
        for start in range(0, len(new), MAX_BATCH):
            folder = name_folder(datetime.now(UTC))
            path = f"{folder}/{self._gateway}-{self._num_batches:08d}.parquet"
            self._batches.append((path, new[start : start + MAX_BATCH]))
            self._num_batches += 1
        while sum(len(batch) for _, batch in self._batches) > MAX_KEPT:
            _, lost = self._batches.popleft()
            logger.error("%d usage records are lost: the store has not answered for too long", len(lost))
            count("swiftkv_usage_records_total", len(lost), outcome="lost")
            self._note(-sum(usage.tokens for usage in lost))

    def _note(self, tokens: int) -> None:
        """So many more are not in the store, or fewer."""
        with self._lock:
            self._unwritten_tokens += tokens
            record("swiftkv_usage_unwritten_tokens", self._unwritten_tokens)
