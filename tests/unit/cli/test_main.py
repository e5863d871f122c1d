"""The command line as a process: SIGTERM ends a command as Ctrl-C does."""

import subprocess
import sys

PROGRAM = """
import sys, time
from swiftkv.cli import main

@main.app.command()
def work():
    try:
        print("working", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)

sys.argv = ["swiftkv", "work"]
main.main()
"""


def test_a_supervisors_signal_lets_the_command_clean_up() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "working\n"
        process.terminate()
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "cleaned up\n", "")
