"""Says whether this machine can hold the set-up, and which packages it lacks. Changes nothing.

Standard library only, and readable by Python 3.8, so that an unfit one gets a message and not a traceback.
Called by: setup.py. Calls: the Pythons it finds, apt-cache.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from typing import NamedTuple

PYTHONS = ("python3", "python3.12", "python3.11")
VERSIONS = ((3, 12), (3, 11))


class SetupError(Exception):
    """What stops the set-up, in words for the user."""


class Interpreter(NamedTuple):
    """A Python that runs."""

    command: str
    version: tuple[int, ...]
    has_venv: bool

    @property
    def is_supported(self) -> bool:
        return self.version[:2] in VERSIONS


def check_machine(wanted: str) -> Interpreter:
    """The Python to use. Raises: SetupError with one `apt install` line for all that is missing."""
    machine = os.uname()
    if (machine.sysname, machine.machine) != ("Linux", "x86_64"):
        raise SetupError(f"this is {machine.sysname} on {machine.machine}; the lock is for Linux on x86_64.")
    interpreter = choose_interpreter([wanted] if wanted else PYTHONS, probe_interpreter)
    if wanted and (interpreter is None or not interpreter.is_supported):
        found = f"is Python {join_version(interpreter.version)}" if interpreter else "does not run"
        raise SetupError(f"PYTHON={wanted} {found}. Name a Python 3.11 or 3.12, or leave PYTHON out.")
    packages = list_missing_packages(interpreter, shutil.which, loads_library, apt_offers)
    if packages:
        raise SetupError(f"this machine lacks something. Install it, then run this again:\n{apt_line(packages)}")
    if interpreter is None or not interpreter.is_supported:
        raise SetupError(
            f"Python 3.11 or 3.12 is needed, {', '.join(PYTHONS)} are not, and this system has no package of one. "
            "Install one and name it: make setup PYTHON=/path/to/python3.12"
        )
    return interpreter


def apt_line(packages: list[str]) -> str:
    """The one line that a user copies."""
    return "sudo apt install " + " ".join(packages)


def choose_interpreter(
    commands: list[str] | tuple[str, ...], probe: Callable[[str], Interpreter | None]
) -> Interpreter | None:
    """The best that runs: supported and able to make a .venv, else supported, else any; None if none runs."""
    found = [interpreter for interpreter in map(probe, commands) if interpreter]
    return max(found, key=lambda it: (it.is_supported, it.is_supported and it.has_venv), default=None)


def probe_interpreter(command: str) -> Interpreter | None:
    """What `command` is, or None if it does not run: pyenv leaves commands behind that only fail."""
    source = (
        "import json, sys\n"
        "try:\n    import ensurepip, venv\nexcept ImportError:\n    has_venv = False\n"
        "else:\n    has_venv = True\n"
        "print(json.dumps([list(sys.version_info[:3]), has_venv]))"
    )
    try:
        result = subprocess.run([command, "-c", source], capture_output=True, text=True, timeout=60, check=True)
        version, has_venv = json.loads(result.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return Interpreter(command, tuple(version), has_venv)


def list_missing_packages(
    interpreter: Interpreter | None,
    find_command: Callable[[str], str | None],
    loads: Callable[[str], bool],
    offers: Callable[[str], bool],
) -> list[str]:
    """The Debian and Ubuntu packages that would make this machine fit; empty if it is, or if none would."""
    packages = []
    if interpreter is None or not interpreter.is_supported:
        names = [f"python{join_version(version)}" for version in VERSIONS]
        packages += next(([name, f"{name}-venv"] for name in names if offers(name)), [])
    elif not interpreter.has_venv:
        packages.append(f"python{join_version(interpreter.version[:2])}-venv")
    if not loads("libnuma.so.1"):
        packages.append("libnuma1")
    if not find_command("git"):
        packages.append("git")
    return packages


def loads_library(name: str) -> bool:
    """True if the dynamic linker finds the library."""
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def apt_offers(package: str) -> bool:
    """True if this system's package lists have it; False where there is no apt."""
    try:
        return bool(subprocess.run(["apt-cache", "show", package], capture_output=True, check=False).stdout)
    except OSError:
        return False


def join_version(version: tuple[int, ...]) -> str:
    """`3.11` from (3, 11)."""
    return ".".join(map(str, version))
