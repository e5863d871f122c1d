"""Resolves pyproject.toml's extras into requirements/*.txt, with hashes. Run by `make lock`.

cpu.txt is what everything runs on; docs.txt is what builds the documentation beside it, in the same versions where both
name a package. Installs nothing into .venv and downloads no package but uv, into a temporary folder. Versions already
in a lock are kept while they still fit; `make lock UPGRADE=1` takes the newest.
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
LOCKS = REPOSITORY / "requirements"
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

DOCS_HEADER = """\
# Made by `make lock` from pyproject.toml for Linux x86_64 and CPython 3.11 and 3.12: do not edit.
# What `make docs` adds to an environment of cpu.txt, in the versions of cpu.txt where it has the package too.
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


def find_docs_requirements(pyproject: str) -> list[str]:
    """What the extra `docs` names."""
    return [str(requirement) for requirement in tomllib.loads(pyproject)["project"]["optional-dependencies"]["docs"]]


def list_pins(lines: list[str]) -> list[str]:
    """The lock's `name==version` lines, without hashes, as constraints."""
    return [line.removesuffix(" \\") for line in lines if re.match(r"\S+==", line)]


def resolve(folder: Path, upgrade: bool) -> dict[str, list[str]]:
    """The lines of the new locks by their names, from the versions of the old ones where they still fit."""
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", UV], check=True)
    pyproject = (REPOSITORY / "pyproject.toml").read_text()
    (folder / "pyproject.toml").write_text(build_uv_project(pyproject))
    environment = build_environment(read_pip_settings(python))

    def compile_lock(name: str, *arguments: str) -> list[str]:
        output = folder / name
        if (LOCKS / name).exists():
            output.write_text((LOCKS / name).read_text())
        options = "--universal --generate-hashes --no-annotate --no-header --no-emit-package=torch --quiet"
        command = [str(python), "-m", "uv", "pip", "compile", *arguments, *options.split(), "--python-version=3.11"]
        command += [f"--output-file={name}", *(["--upgrade"] if upgrade else [])]
        subprocess.run(command, check=True, cwd=folder, env=environment)
        return output.read_text().splitlines()

    cpu = compile_lock("cpu.txt", "pyproject.toml", "--extra=cpu", "--extra=dev", "--extra=evaluate")
    (folder / "docs.in").write_text("".join(f"{line}\n" for line in find_docs_requirements(pyproject)))
    (folder / "pins.txt").write_text("".join(f"{line}\n" for line in list_pins(cpu)))
    return {"cpu.txt": cpu, "docs.txt": compile_lock("docs.txt", "docs.in", "--constraints=pins.txt")}


def main() -> int:
    """Writes the locks. Returns the exit status."""
    with tempfile.TemporaryDirectory(prefix="swiftkv-lock-") as folder:
        locks = resolve(Path(folder), "--upgrade" in sys.argv[1:])
    LOCKS.mkdir(exist_ok=True)
    for name, resolved in locks.items():
        lines = [strip_assumed_markers(line) for line in resolved]
        assert not any("://" in line for line in lines), "the lock would name an index"
        (LOCKS / name).write_text((DOCS_HEADER if name == "docs.txt" else HEADER) + "\n".join(lines) + "\n")
        count = sum("==" in line for line in lines)
        print(f"lock: {count} packages in {(LOCKS / name).relative_to(REPOSITORY)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
