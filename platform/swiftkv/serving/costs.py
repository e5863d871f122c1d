"""Exports whose the seconds of a replica's engine are, from the file that its process writes (engine/scheduler.py).

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
        self._counted: dict[tuple[str, str], float] = {}
        os.environ[FILE_KEY] = str(self._path)
        threading.Thread(target=self._run, name="costs", daemon=True).start()

    def read(self) -> None:
        """Counts what is new; nothing while the engine has written nothing."""
        try:
            rows = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        for tenant, phase, seconds in rows:
            grown = seconds - self._counted.get((tenant, phase), 0.0)
            if grown > 0:
                self._counted[tenant, phase] = seconds
                count("swiftkv_replica_seconds_total", grown, tenant=tenant, phase=phase)

    def _run(self) -> None:
        is_over = threading.Event()
        while not is_over.wait(READ_S):
            self.read()
