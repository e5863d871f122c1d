"""Makes .venv in this checkout: CPU torch, the locked packages, the checkout itself. Run by `make setup`.

Uses neither root nor apt: it names what the machine lacks and stops before it changes anything. A run that
was cut short is begun again from nothing; a run on a finished .venv reads one stamp and returns.
Standard library only, and readable by Python 3.8, so that an unfit one gets a message and not a traceback.
Called by: the Makefile. Calls: venv and pip.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from machine import Interpreter, SetupError, check_machine, join_version, probe_interpreter
from pip_runner import Progress, run_pip

REPOSITORY = Path(__file__).resolve().parent.parent
VENV = REPOSITORY / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup.json"
STARTED = VENV / "setup.started"
LOCK = REPOSITORY / "requirements" / "cpu.txt"
PYPROJECT = REPOSITORY / "pyproject.toml"

# PyTorch's own index of CPU builds, asked only where pip's own configuration has none. Named here alone.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PUBLISHED_AS_SOURCES = ("rouge-score", "sqlitedict", "word2number")
"""Plain Python without a wheel, which lm-eval asks for; nothing else is built here."""
MEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")


def main(arguments: list[str]) -> int:
    """Sets up .venv. Returns the exit status: 0 done, 1 something is missing or failed, 130 interrupted."""
    parser = argparse.ArgumentParser(description="Make .venv in this checkout.")
    parser.add_argument("--python", default="", help="the Python 3.11 or 3.12 to use (default: the first found)")
    wanted = parser.parse_args(arguments).python
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with_lock(lambda: set_up(wanted))
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; run `make setup` again", file=sys.stderr)
        return 130
    return 0


def with_lock(action: Callable[[], None]) -> None:
    """Runs `action` while no other set-up of this checkout runs."""
    folder = os.open(REPOSITORY, os.O_RDONLY)
    # pip inherits the lock: one that outlives a killed set-up holds the next one off until it has ended.
    os.set_inheritable(folder, True)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("setup: waiting for another set-up of this checkout", flush=True)
        fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        action()
    finally:
        os.close(folder)


def set_up(wanted: str) -> None:
    """Brings .venv up to date with the lock and pyproject.toml, from the Python `wanted` if one is named."""
    if is_current(wanted):
        return
    started = time.monotonic()
    interpreter = check_machine(wanted)
    stages: list[tuple[str, Callable[[], None]]] = [
        (f".venv with Python {join_version(interpreter.version)}", lambda: prepare_venv(interpreter)),
        (f"PyTorch {read_torch_pin()}, CPU build", install_torch),
        (f"{count_locked_packages()} locked packages", install_locked_packages),
        ("swiftkv from this checkout", install_checkout),
    ]
    for number, (title, stage) in enumerate(stages, start=1):
        print(f"setup: [{number}/{len(stages)}] {title}", flush=True)
        stage()
        print(f"setup: [{number}/{len(stages)}] done after {time.monotonic() - started:.0f} s", flush=True)
    remove_media_packages()
    report_compiler()
    STAMP.write_text(json.dumps({"digest": compute_digest(), "python": list(interpreter.version[:2])}))
    STARTED.unlink()


# --- what is there already ---


def is_current(wanted: str) -> bool:
    """True if .venv was finished from this lock and pyproject.toml, in this place, by the Python asked for."""
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return False
    if STARTED.exists() or not VENV_PYTHON.exists() or stamp.get("digest") != compute_digest():
        return False
    interpreter = probe_interpreter(wanted) if wanted else None
    return not wanted or (interpreter is not None and list(interpreter.version[:2]) == stamp["python"])


def compute_digest() -> str:
    """A hash of everything that decides what .venv holds; the place counts, for a moved .venv is broken."""
    digest = hashlib.sha256(str(REPOSITORY).encode())
    for path in (LOCK, PYPROJECT, Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# --- the stages ---


def prepare_venv(interpreter: Interpreter) -> None:
    """An empty .venv, or the finished one that is to be updated, marked as being worked on."""
    finished = STAMP.exists() and not STARTED.exists() and VENV_PYTHON.exists()
    present = probe_interpreter(str(VENV_PYTHON)) if finished else None
    if present is None or present.version[:2] != interpreter.version[:2]:
        if VENV.exists():
            STAMP.unlink(missing_ok=True)  # first, or a removal that is cut short looks finished
            shutil.rmtree(VENV)
        run([interpreter.command, "-m", "venv", str(VENV)])
    STARTED.touch()


def install_torch(python: Path = VENV_PYTHON) -> None:
    """The CPU build, for the environment of `python`, from wherever pip looks by itself, else from PyTorch's index."""
    arguments = ["install", "--no-deps", f"torch=={read_torch_pin()}"]
    errors = run_pip(python, arguments, may_fail=True)
    if errors:
        print(f"setup:       not found where pip looks ({errors[-1]}); asking PyTorch's own index", flush=True)
        run_pip(python, [*arguments, "--index-url", TORCH_CPU_INDEX])


def install_locked_packages() -> None:
    """Every package of the lock, by hash, with one progress line for all of them."""
    progress = Progress(VENV, count_locked_packages())
    binary = ["--only-binary=:all:", f"--no-binary={','.join(PUBLISHED_AS_SOURCES)}"]
    arguments = ["install", "--no-deps", "--require-hashes", *binary, "-r", str(LOCK)]
    try:
        run_pip(VENV_PYTHON, arguments, on_line=progress.take_line)
    finally:
        progress.close()


def install_checkout() -> None:
    """swiftkv, editable: the `swiftkv` command and the entry point that vLLM looks for."""
    run_pip(VENV_PYTHON, ["install", "--no-deps", "--no-build-isolation", "--quiet", "--editable", str(REPOSITORY)])


def remove_media_packages() -> None:
    """Takes out the builds that break a CPU torch. Raises: SetupError if one is left."""
    if find_media_packages():
        run_pip(VENV_PYTHON, ["uninstall", "--yes", "--quiet", *MEDIA_PACKAGES])
    if find_media_packages():
        raise SetupError(f"{', '.join(find_media_packages())} cannot be removed from .venv. Run `make clean` first.")


def find_media_packages() -> list[str]:
    """Those of MEDIA_PACKAGES that .venv holds."""
    return [name for name in MEDIA_PACKAGES if list(VENV.glob(f"lib/python3*/site-packages/{name}"))]


def report_compiler() -> None:
    """Says so if the engine will run eager; proves on the way that swiftkv can be imported."""
    source = (
        "from swiftkv.engine.compiler import EAGER_REASON, has_cxx_compiler\n"
        "print('' if has_cxx_compiler() else EAGER_REASON)"
    )
    reason = run([str(VENV_PYTHON), "-c", source])
    if reason:
        print(f"setup: note: {reason}", flush=True)


# --- small things ---


def run(command: list[str]) -> str:
    """What the command printed. Raises: SetupError with its last words."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SetupError(f"`{' '.join(command)}` failed:\n{(result.stderr or result.stdout).strip()}")
    return result.stdout.strip()


def read_torch_pin() -> str:
    """The version and build, such as 2.13.0+cpu, from pyproject.toml."""
    match = re.search(r'"torch==([^"+]+)"', PYPROJECT.read_text())
    assert match, "pyproject.toml pins no torch"
    return f"{match[1]}+cpu"


def count_locked_packages() -> int:
    """How many packages the lock names."""
    return len(re.findall(r"^\S+==", LOCK.read_text(), flags=re.MULTILINE))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
