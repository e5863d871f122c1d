"""Runs pip and shows how far it is, without its noise. Decides nothing about what is installed.

Standard library only, and readable by Python 3.8.
Called by: setup.py. Calls: pip.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

from machine import SetupError

# pip says these for every package and every folder of its configuration that does not hold it.
PIP_NOISE = re.compile(r"WARNING: (Location|Url) '.*' is ignored|WARNING: .*find-links|\[notice\]")


class Progress:
    """Draws how far pip is: packages collected, then packages in place. One line on a terminal, else a few."""

    def __init__(self, venv: Path, total: int) -> None:
        self.venv = venv
        self.total = total
        self.collected = 0
        self.shown = ""
        self.already = self.count_installed()
        self.finished = threading.Event()
        self.watcher: threading.Thread | None = None

    def take_line(self, line: str) -> None:
        if line.startswith(("Collecting ", "Requirement already satisfied")):
            self.collected += 1
            self.show("collected", self.collected)
        elif line.startswith("Installing collected packages"):
            # pip says nothing while it installs: count what has arrived instead.
            self.watcher = threading.Thread(target=self.watch, daemon=True)
            self.watcher.start()

    def watch(self) -> None:
        while not self.finished.wait(0.5):
            self.show("installed", self.count_installed() - self.already)

    def count_installed(self) -> int:
        return len(list(self.venv.glob("lib/python3*/site-packages/*.dist-info")))

    def show(self, verb: str, count: int) -> None:
        count = min(count, self.total)
        terminal = sys.stdout.isatty()
        steps = 24 if terminal else 4
        bar = "#" * (count * steps // self.total)
        text = f"setup:       {verb} [{bar:.<{steps}}]" + (f" {count}/{self.total}" if terminal else "")
        if text != self.shown:
            print(f"\r{text}" if terminal else text, end="" if terminal else "\n", flush=True)
            self.shown = text

    def close(self) -> None:
        self.finished.set()
        if self.watcher:
            self.watcher.join()
            self.show("installed", self.count_installed() - self.already)
        if sys.stdout.isatty():
            print(flush=True)


def run_pip(
    python: Path, arguments: list[str], may_fail: bool = False, on_line: Callable[[str], None] | None = None
) -> list[str]:
    """Runs pip in the environment of `python`. Returns its complaints if it failed and may, else an empty list.

    pip's own output is shown on a terminal only; `on_line` is given it instead.
    Raises: SetupError with pip's complaints.
    """
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    output = subprocess.PIPE if on_line or not sys.stdout.isatty() else None
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    complaints: list[str] = []
    with subprocess.Popen(
        command, stdout=output, stderr=subprocess.PIPE, text=True, env=environment, close_fds=False
    ) as process:
        try:
            listener = threading.Thread(target=collect_complaints, args=(process.stderr, complaints))
            listener.start()
            for line in process.stdout or ():
                if on_line:
                    on_line(line)
            listener.join()
        except KeyboardInterrupt:
            process.terminate()
            raise
    if process.returncode == 0:
        return []
    if may_fail:
        return complaints or ["pip failed"]
    raise SetupError("pip failed; run `make setup` again once this is mended:\n" + "\n".join(complaints[-20:]))


def collect_complaints(stream: IO[str], complaints: list[str]) -> None:
    """Reads pip's stderr to its end into `complaints`, without the noise."""
    complaints += [line.rstrip() for line in stream if line.strip() and not PIP_NOISE.search(line)]
