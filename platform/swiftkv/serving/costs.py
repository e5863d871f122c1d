"""Exports whose the seconds of a replica's engine are, and its FLOPs, from the file that its process writes
(engine/scheduler.py).

Called by: serving/engine.py. Calls: metrics.
"""

import json
import os
import tempfile
import threading
from pathlib import Path

from swiftkv.engine.scheduler_names import FILE_KEY
from swiftkv.metrics import count

READ_S = 5.0
"""Ray's agents export every 10 s."""


class CostReader:
    """Counts what an engine's ledger has grown by; begins with the engine and ends with its process."""

    def __init__(self) -> None:
        """Names the file to the engine that this process starts next."""
        self._folder = tempfile.TemporaryDirectory(prefix="swiftkv-ledger-")
        self._path = Path(self._folder.name) / "ledger.json"
        self._counted: dict[tuple[str, ...], float] = {}
        os.environ[FILE_KEY] = str(self._path)
        threading.Thread(target=self._run, name="costs", daemon=True).start()

    def read(self) -> None:
        """Counts what is new; nothing while the engine has written nothing."""
        try:
            rows = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        for tenant, phase, seconds in rows["seconds"]:
            self._count("swiftkv_replica_seconds_total", seconds, tenant=tenant, phase=phase)
        for tenant, seconds in rows.get("unmodified_seconds", ()):
            self._count("swiftkv_unmodified_replica_seconds_total", seconds, tenant=tenant)
        for phase, work, flops in rows.get("device_flops", ()):
            self._count("swiftkv_device_flops_total", flops, phase=phase, work=work)

    def _count(self, name: str, value: float, **labels: str) -> None:
        key = (name, *labels.values())
        grown = value - self._counted.get(key, 0.0)
        if grown > 0:
            self._counted[key] = value
            count(name, grown, **labels)

    def _run(self) -> None:
        is_over = threading.Event()
        while not is_over.wait(READ_S):
            self.read()
