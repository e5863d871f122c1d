"""The command line as a process."""

import signal
import subprocess
import sys

import pytest

from swiftkv.cli.bench import _describe_command

CODE = """
import time
from swiftkv.cli import main

@main.app.command()
def wait() -> None:
    try:
        print("waiting", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)

main.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_supervisor_or_a_closed_terminal_ends_a_command_as_ctrl_c_does(number):
    as_in_a_terminal = "import signal; signal.signal(2, signal.default_int_handler); signal.signal(1, signal.SIG_DFL)"
    command = [sys.executable, "-c", f"{as_in_a_terminal}{CODE}", "wait"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert output == "cleaned up\n" and process.returncode == 130


@pytest.mark.parametrize(
    "written",
    [["--json", "/tmp/figures.json"], ["--report=reports/engine"], ["--report", "reports/engine", "--json", "a b"], []],
)
def test_a_report_names_the_command_without_the_files_of_its_machine(written):
    arguments = ["bench", "engine", *written, "--rows", "prefill"]
    assert _describe_command(arguments) == "swiftkv bench engine --rows prefill"
