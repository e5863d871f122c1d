"""Fills /opt/swiftkv inside an image's build stage, and describes what it holds. Runs nowhere else.

    install.py packages train|serve     a virtual environment with the lock's parts that the image needs, by hash
    install.py wheel                    this package, built here, and sbom.cdx.json; then pip goes

Environment: DEVICE (cpu or cuda), SOURCE_DATE_EPOCH (for the wheel). pip reads /etc/pip.conf, where one is given.
Called by: docker/*.Dockerfile. Calls: scripts/setup.py, scripts/lock_parts.py, pip, hatchling, cyclonedx-py.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(SOURCE / "scripts"))

from lock_parts import select_parts  # noqa: E402
from machine import SetupError  # noqa: E402
from setup import install_torch  # noqa: E402

TARGET = Path("/opt/swiftkv")
TOOLS = Path("/opt/tools")
SBOM = Path("/opt/sbom.cdx.json")
WHEELS = SOURCE / "dist"
"""Always the same: pip writes into the environment where a wheel came from."""

PARTS = {"train": ["train"], "serve": ["train", "serve"]}
"""Of the lock, by image."""


def main(arguments: list[str]) -> int:
    """Does what the first word says. Returns the exit status."""
    try:
        if arguments[0] == "packages":
            install_packages(arguments[1], os.environ["DEVICE"])
        else:
            install_wheel()
    except SetupError as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    return 0


def install_packages(image: str, device: str) -> None:
    """The virtual environment of `image`, without this package. Raises: SetupError if there is no lock for `device`."""
    lock = SOURCE / "requirements" / f"{device}.txt"
    if not lock.is_file():
        raise SetupError(f"there is no requirements/{device}.txt, and nothing is installed unpinned: `make lock`.")
    venv.create(TARGET, with_pip=True)
    python = TARGET / "bin" / "python"
    if device == "cpu":
        install_torch(python)  # of a CUDA lock it is a part
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(select_parts(lock.read_text(), PARTS[image]))
        file.flush()
        install_locked(python, Path(file.name))


def install_wheel() -> None:
    """This package as a wheel, the description of all that is installed, and bytecode that depends on no time."""
    venv.create(TOOLS, with_pip=True)
    install_locked(TOOLS / "bin" / "python", SOURCE / "requirements" / "image-tools.txt")
    run(TOOLS / "bin" / "hatchling", "build", "-t", "wheel", "-d", str(WHEELS), cwd=SOURCE)
    (wheel,) = WHEELS.glob("*.whl")
    pip(TARGET / "bin" / "python", "--no-deps", "--no-index", str(wheel))
    run(TARGET / "bin" / "python", "-m", "pip", "uninstall", "--yes", "--quiet", "pip")
    describe(TARGET / "bin" / "python")
    remove_old_bytecode()
    # Unchecked: valid whatever the files' times are, which an image's layers do not keep. Some packages bring files for
    # newer Pythons, which do not compile and which nobody imports here; ours must.
    compile_all = ["-m", "compileall", "-qq", "--invalidation-mode", "unchecked-hash"]
    run(TARGET / "bin" / "python", *compile_all, str(TARGET), may_fail=True)
    (ours,) = TARGET.glob("lib/python3*/site-packages/swiftkv")
    run(TARGET / "bin" / "python", *compile_all, str(ours))


def install_locked(python: Path, lock: Path) -> None:
    """Every package of `lock`, by hash; nothing is built here."""
    pip(python, "--no-deps", "--require-hashes", "--only-binary=:all:", "-r", str(lock))


def describe(python: Path) -> None:
    """Writes the software bill of materials, CycloneDX, from the distributions that `python` has."""
    options = "--output-reproducible --spec-version 1.6 --output-format JSON --pyproject pyproject.toml".split()
    options += ["--output-file", str(SBOM)]
    run(TOOLS / "bin" / "cyclonedx-py", "environment", *options, str(python), cwd=SOURCE)


def pip(python: Path, *arguments: str) -> None:
    """`pip install` without a cache, bytecode or a word about newer pips."""
    options = ["--disable-pip-version-check", "--no-cache-dir", "--root-user-action=ignore", "--quiet"]
    run(python, "-m", "pip", "install", "--no-compile", *options, *arguments)


def remove_old_bytecode() -> None:
    """What ensurepip and the programs that ran here have compiled, with times inside."""
    for folder in TARGET.rglob("__pycache__"):
        shutil.rmtree(folder)


def run(program: Path, *arguments: str, cwd: Path | None = None, may_fail: bool = False) -> None:
    """Raises: SetupError if it fails and may not; it has then said why."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
    if subprocess.run([str(program), *arguments], cwd=cwd, env=environment, check=False).returncode and not may_fail:
        raise SetupError(f"`{program.name} {' '.join(arguments[:4])} …` failed.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
