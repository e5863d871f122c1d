"""Resolves pyproject.toml's `cpu` and `dev` extras into requirements/cpu.txt, with hashes. Run by `make lock`.

Installs nothing into .venv and downloads no package but uv, into a temporary folder. Versions already in the
lock are kept while they still fit; `make lock UPGRADE=1` takes the newest.
Called by: the Makefile. Calls: pip (to fetch uv and read its index), uv.
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

from pip_settings import read_pip_settings

REPOSITORY = Path(__file__).resolve().parent.parent
LOCK = REPOSITORY / "requirements" / "cpu.txt"
UV = "uv==0.13.8"

# What a CPU environment must not hold: scripts/setup.py installs torch alone, from a CPU build.
LEFT_OUT = [
    # Ordinary builds are CUDA builds and break `import torchvision`, and with it transformers, on a CPU torch.
    "torchvision",
    "torchaudio",
    "torchcodec",
    # nixl takes the first backend that imports; on a CPU torch nixl-cu13 alone does.
    "nixl-cu12",
    # 1 GB that xgrammar names for its GPU kernel; vLLM turns it off on CPU, inductor never asks.
    "triton",
    # Device offload of intel-openmp, which vLLM never asks for.
    "intel-cmplr-lib-ur",
    # What the ordinary torch of the same version brings.
    "cuda-bindings",
    "cuda-toolkit",
    "nvidia-cublas",
    "nvidia-cudnn-cu13",
    "nvidia-cusparselt-cu13",
    "nvidia-nccl-cu13",
    "nvidia-nvshmem-cu13",
]

# Every line would carry these conditions; setup.py checks them once instead.
ASSUMED = [
    "python_full_version < '3.13'",
    "platform_machine == 'x86_64'",
    "platform_python_implementation == 'CPython'",
    "sys_platform == 'linux'",
]

HEADER = """\
# Made by `make lock` from pyproject.toml for Linux x86_64 and CPython 3.11 and 3.12: do not edit.
# Without torch, which scripts/setup.py installs first, and without what scripts/lock.py leaves out.
"""


def build_environment(pip_settings: dict[str, str]) -> dict[str, str]:
    """The environment in which uv asks the same index as pip.

    Extra indexes and find-links folders are left out: one that holds some of a version's wheels would hide
    the hashes of the others.
    """
    environment = dict(os.environ)
    if "index-url" in pip_settings:
        environment["UV_DEFAULT_INDEX"] = pip_settings["index-url"]
    if "cert" in pip_settings:
        environment["SSL_CERT_FILE"] = pip_settings["cert"]
    return environment


def build_uv_project(pyproject: str) -> str:
    """The project's own pyproject.toml with uv's choices added."""
    torch = find_torch_pin(pyproject)
    settings = {
        "environments": [" and ".join(ASSUMED)],
        "override-dependencies": [torch],
        "exclude-dependencies": LEFT_OUT,
    }
    # A list of plain strings is written the same way in Python and in TOML.
    return pyproject + "\n[tool.uv]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items())


def find_torch_pin(pyproject: str) -> str:
    """`torch==<version>` as pyproject.toml names it, without a build such as `+cpu`."""
    dependencies = tomllib.loads(pyproject)["project"]["dependencies"]
    return next(str(requirement) for requirement in dependencies if requirement.startswith("torch=="))


def strip_assumed_markers(line: str) -> str:
    """A line of the lock without the conditions that hold for every line."""
    match = re.fullmatch(r"(\S+==\S+) ; (.*?)( \\)?", line)
    if not match or " or " in match[2]:
        return line
    kept = [clause for clause in match[2].split(" and ") if clause not in ASSUMED]
    return match[1] + (" ; " + " and ".join(kept) if kept else "") + (match[3] or "")


def resolve(folder: Path, upgrade: bool) -> list[str]:
    """The lines of a new lock, from the versions of the old one where they still fit."""
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", UV], check=True)
    (folder / "pyproject.toml").write_text(build_uv_project((REPOSITORY / "pyproject.toml").read_text()))
    output = folder / "cpu.txt"
    if LOCK.exists():
        output.write_text(LOCK.read_text())
    options = "--universal --generate-hashes --no-annotate --no-header --no-emit-package=torch --quiet"
    command = [str(python), "-m", "uv", "pip", "compile", "pyproject.toml", *options.split()]
    command += ["--extra=cpu", "--extra=dev", "--extra=evaluate", "--python-version=3.11"]
    command += ["--output-file=cpu.txt", *(["--upgrade"] if upgrade else [])]
    subprocess.run(command, check=True, cwd=folder, env=build_environment(read_pip_settings(python)))
    return output.read_text().splitlines()


def main() -> int:
    """Writes the lock. Returns the exit status."""
    with tempfile.TemporaryDirectory(prefix="swiftkv-lock-") as folder:
        lines = [strip_assumed_markers(line) for line in resolve(Path(folder), "--upgrade" in sys.argv[1:])]
    assert not any("://" in line for line in lines), "the lock would name an index"
    LOCK.parent.mkdir(exist_ok=True)
    LOCK.write_text(HEADER + "\n".join(lines) + "\n")
    count = sum("==" in line for line in lines)
    print(f"lock: {count} packages in {LOCK.relative_to(REPOSITORY)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
