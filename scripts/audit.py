"""Looks for known vulnerabilities in the packages that the locks name: `make audit`.

Asks the vulnerability service that pip-audit asks; needs no .venv and installs none of the packages. Standard library
only.
A finding that does not concern us is named in IGNORED, with why.
Called by: the Makefile, .github/workflows/ci.yml. Calls: pip (to fetch pip-audit into a temporary folder), pip-audit.
"""

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LOCKS = sorted((REPOSITORY / "requirements").glob("*.txt"))
AUDITOR = "pip-audit==2.10.1"

IGNORED: dict[str, str] = {}
"""Ids of findings that stay, each with its reason."""


def build_commands(python: str, torch: Path) -> list[list[str]]:
    """pip-audit for the hashed locks, and for torch, which no lock holds. `torch`: a file that names its version."""
    ignored = [word for finding in IGNORED for word in ("--ignore-vuln", finding)]
    audit = [python, "-m", "pip_audit", "--disable-pip", "--progress-spinner=off", *ignored]
    hashed = [[*audit, "--require-hashes", "--requirement", str(lock)] for lock in LOCKS]
    return [*hashed, [*audit, "--no-deps", "--requirement", str(torch)]]


def read_torch_pin(pyproject: str) -> str:
    """`torch==VERSION` as pyproject.toml has it."""
    match = re.search(r'"(torch==[^"]+)"', pyproject)
    assert match, "pyproject.toml pins no torch"
    return match[1]


def main() -> int:
    """Exit status: 1 if anything was found, or could not be asked."""
    with tempfile.TemporaryDirectory(prefix="swiftkv-audit-") as folder:
        venv.create(Path(folder) / "venv", with_pip=True)
        python = str(Path(folder) / "venv" / "bin" / "python")
        subprocess.run([python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", AUDITOR], check=True)
        torch = Path(folder) / "torch.txt"
        torch.write_text(read_torch_pin((REPOSITORY / "pyproject.toml").read_text()) + "\n")
        results = [subprocess.run(command, check=False).returncode for command in build_commands(python, torch)]
    return int(any(results))


if __name__ == "__main__":
    sys.exit(main())
