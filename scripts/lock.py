"""Resolves pyproject.toml's extras into requirements/*.txt, with hashes. Run by `make lock`.

    cpu.txt            everything: what `make setup` installs, in parts that images take
    cuda.txt           the images for GPUs: the CUDA builds of PyTorch and vLLM
    image-tools.txt    what builds and describes images, and is not in them
    docs.txt           what `make docs` adds to an environment of cpu.txt, in its versions where both name a package

Installs nothing into .venv and downloads no package but uv, into a temporary folder. Versions already in the
locks are kept while they still fit; `make lock UPGRADE=1` takes the newest.
Called by: the Makefile. Calls: pip (to fetch uv and read its index), uv, lock_parts.py.
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lock_parts import join_parts, leave_out, list_names
from pip_settings import read_pip_settings

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = REPOSITORY / "requirements"
UV = "uv==0.13.8"

# What a CPU environment must not hold: scripts/setup.py installs torch alone, from a CPU build.
LEFT_OUT_ON_CPU = [
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
# This torch is built for CUDA 13, and nixl would take the backend for CUDA 12 if it were there.
LEFT_OUT_ON_CUDA = ["nixl-cu12"]

# Every line would carry these conditions; setup.py checks them once instead.
ASSUMED = [
    "python_full_version < '3.13'",
    "platform_machine == 'x86_64'",
    "platform_python_implementation == 'CPython'",
    "sys_platform == 'linux'",
]

HEADER = """\
# Made by `make lock` from pyproject.toml for Linux x86_64 and CPython 3.11 and 3.12: do not edit.
"""
WITHOUT_TORCH = "# Without torch, which scripts/setup.py installs first, and without what scripts/lock.py leaves out.\n"


class Lock(NamedTuple):
    """One file of requirements/."""

    name: str
    parts: dict[str, list[str]]
    """Of the file, in its order: the extras that the part and those before it are the answer to."""
    left_out: list[str]
    has_torch: bool


CPU = Lock("cpu", {"train": [], "serve": ["cpu"], "develop": ["cpu", "dev", "evaluate"]}, LEFT_OUT_ON_CPU, False)
CUDA = Lock("cuda", {"train": [], "serve": ["gpu"]}, LEFT_OUT_ON_CUDA, True)


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


def build_uv_project(pyproject: str, left_out: Sequence[str]) -> str:
    """The project's own pyproject.toml with uv's choices added."""
    torch = find_torch_pin(pyproject)
    settings = {
        "environments": [" and ".join(ASSUMED)],
        "override-dependencies": [torch],
        "exclude-dependencies": list(left_out),
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


class Resolver:
    """uv, in a folder of its own."""

    def __init__(self, folder: Path, upgrade: bool) -> None:
        venv.create(folder / "venv", with_pip=True)
        self._python = folder / "venv" / "bin" / "python"
        subprocess.run([str(self._python), "-m", "pip", "install", "--quiet", UV], check=True)
        self._folder, self._upgrade = folder, upgrade
        self._environment = build_environment(read_pip_settings(self._python))

    def resolve_lock(self, lock: Lock, relative: str = "") -> str:
        """The text of a new lock, with the versions of `relative`, another lock, and of the old one where they fit."""
        project = build_uv_project((REPOSITORY / "pyproject.toml").read_text(), lock.left_out)
        (self._folder / "pyproject.toml").write_text(project)
        *parts, last_part = lock.parts
        options = [] if lock.has_torch else ["--no-emit-package=torch"]
        old = [] if self._upgrade else self._read_old(lock.name)
        preferred = relative.splitlines() + leave_out(old, list_names(relative.splitlines()))
        lines = self._compile("pyproject.toml", lock.name, lock.parts[last_part], options, preferred)
        names = {part: list_names(self._list(lock.name, lock.parts[part], lines)) for part in parts}
        header = HEADER if lock.has_torch else HEADER + WITHOUT_TORCH
        return header + "\n" + join_parts(map(strip_assumed_markers, lines), last_part, names)

    def resolve_extra(self, name: str, extra: str, relative: str = "") -> str:
        """The text of the lock of one extra, without what the package itself needs; else as `resolve_lock`."""
        pyproject = (REPOSITORY / "pyproject.toml").read_text()
        requirements = tomllib.loads(pyproject)["project"]["optional-dependencies"][extra]
        (self._folder / "pyproject.toml").write_text(build_uv_project(pyproject, []))
        (self._folder / f"{extra}.in").write_text("\n".join(requirements) + "\n")
        old = [] if self._upgrade else self._read_old(name)
        preferred = relative.splitlines() + leave_out(old, list_names(relative.splitlines()))
        lines = self._compile(f"{extra}.in", name, [], [], preferred)
        return HEADER + "\n" + "\n".join(map(strip_assumed_markers, lines)) + "\n"

    def _list(self, name: str, extras: Sequence[str], chosen: Sequence[str]) -> list[str]:
        """The requirements of these extras alone, at the versions in the lines `chosen`."""
        listed = self._compile("pyproject.toml", f"{name}-part", extras, [], chosen)
        versions = {line.split(" ")[0] for line in chosen if "==" in line}
        odd = [line for line in listed if "==" in line and line.split(" ")[0] not in versions and "torch==" not in line]
        assert not odd, f"other versions than in the whole lock: {odd[:5]}"
        return listed

    def _compile(
        self, source: str, name: str, extras: Sequence[str], options: Sequence[str], preferred: Sequence[str]
    ) -> list[str]:
        """The requirements of `source` with these extras, as lines, at the `preferred` lines' versions if they fit."""
        output = self._folder / f"{name}.txt"
        output.write_text("\n".join(preferred) + "\n")  # uv keeps what it finds in the file that it writes
        command = [str(self._python), "-m", "uv", "pip", "compile", source, "--universal", "--generate-hashes"]
        command += ["--no-annotate", "--no-header", "--quiet", "--python-version=3.11", *options]
        command += [*(f"--extra={extra}" for extra in extras), f"--output-file={output.name}"]
        subprocess.run(command, check=True, cwd=self._folder, env=self._environment)
        return output.read_text().splitlines()

    def _read_old(self, name: str) -> list[str]:
        path = FOLDER / f"{name}.txt"
        return path.read_text().splitlines() if path.exists() else []


def main() -> int:
    """Writes the locks. Returns the exit status."""
    with tempfile.TemporaryDirectory(prefix="swiftkv-lock-") as folder:
        resolver = Resolver(Path(folder), "--upgrade" in sys.argv[1:])
        texts = {CPU.name: resolver.resolve_lock(CPU)}
        texts[CUDA.name] = resolver.resolve_lock(CUDA, relative=texts[CPU.name])  # both kinds of image have the same
        texts["image-tools"] = resolver.resolve_extra("image-tools", "image")
        texts["docs"] = resolver.resolve_extra("docs", "docs", relative=texts[CPU.name])
    for name, text in texts.items():
        assert "://" not in text, "the lock would name an index"
        (FOLDER / f"{name}.txt").write_text(text)
        print(f"lock: {len(list_names(text.splitlines()))} packages in requirements/{name}.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
