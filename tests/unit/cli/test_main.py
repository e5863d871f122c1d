"""The command line as a process: signals end it as Ctrl-C does, but for those that whoever started it has set aside."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import time
from swiftkv.cli import main

def work():
    try:
        print("working", flush=True)
        time.sleep(float("%s"))
    finally:
        print("cleaned up", flush=True)

main.app = work
main.main()
"""


def start(seconds: float, before: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", before + PROGRAM % seconds]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_lets_the_command_clean_up(number: signal.Signals) -> None:
    process = start(60)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "cleaned up\n", "interrupted\n")


def test_under_nohup_a_closed_terminal_ends_nothing() -> None:
    process = start(2, "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n")
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=30) == ("cleaned up\n", "") and process.returncode == 0
