"""Watches how much memory the quickstart takes: this process, what it started, and its Ray cluster.

Called by: run.py.
"""

import threading
from contextlib import suppress
from pathlib import Path

import psutil

from swiftkv.cluster import find_processes, read_record

_PERIOD_S = 2.0


class MemoryWatch:
    """Samples the proportional memory (PSS: shared pages counted once) until it is left."""

    peak_bytes = 0

    def __enter__(self) -> "MemoryWatch":
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(_PERIOD_S):
            self.peak_bytes = max(self.peak_bytes, _measure())


def _measure() -> int:
    ourselves = psutil.Process()
    processes = {process.pid for process in (ourselves, *ourselves.children(recursive=True))}
    cluster = read_record()
    if cluster is not None:
        processes |= {process.pid for process in find_processes(cluster)}
    return sum(_read_pss_bytes(pid) for pid in processes)


def _read_pss_bytes(pid: int) -> int:
    with suppress(OSError):  # it has ended meanwhile
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
