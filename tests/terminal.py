"""One terminal for a whole page: blocks run in it one after the other, as a reader types them, and what they start is
known and can be ended.

Has no commands of its own but those that run a block and tell when it has ended. Called by: tests/integration.
"""

import os
import selectors
import subprocess
import time
import uuid
from functools import partial

import psutil

FOREIGN = ("SWIFTKV_", "AWS_", "OPENAI_", "RAY_", "VLLM_", "PYTHON", "PYTEST", "HF_", "VIRTUAL_ENV", "BASH_ENV", "MAKE")
"""Beginnings of variables that a new user's terminal does not have."""
MARK = "WALK_OF_A_TEST"
"""The environment variable that everything inherits that is started in the terminal."""
DEAD = (psutil.STATUS_DEAD, psutil.STATUS_ZOMBIE)


class Failed(AssertionError):
    """A command of a block ended with another status than 0, or did not end."""


class Terminal:
    """A bash in this folder, with the environment of someone who has just logged in."""

    def __init__(self, folder, log):
        self.folder, self.log = folder, log
        self.ran = []
        """The texts, as they were run."""
        self._mark, self._seen = uuid.uuid4().hex, {}
        environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        if active := os.environ.get("VIRTUAL_ENV"):
            path = environment["PATH"].split(os.pathsep)
            environment["PATH"] = os.pathsep.join(part for part in path if part != f"{active}/bin")
        self._shell = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=folder,
            env=environment | {MARK: self._mark, "COLUMNS": "160"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        os.set_blocking(self._shell.stdout.fileno(), False)
        # A block ends at the first command that fails: a reader would stop there.
        self._type("set -o pipefail; trap 'failed=$?; echo \"failed: $BASH_COMMAND\"; return 0' ERR")

    def run(self, text, timeout_s=600.0):
        """What the block printed. Raises: Failed."""
        self.ran.append(text)
        path = self.log.parent / f"{self.log.stem}-{len(self.ran)}.sh"
        path.write_text(text, encoding="utf-8")
        end = f"end-of-{uuid.uuid4().hex}"
        self._type(f"failed=0; source '{path}' < /dev/null; printf '\\n%s %s\\n' {end} $failed")
        said, _, status = self._read_until(end, time.monotonic() + timeout_s).rpartition(end)
        self.look()
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"{text}{said}\n")
        if not status.strip():
            raise Failed(f"not over after {timeout_s:.0f} s:\n{text}\n{said[-4000:]}")
        if int(status):
            raise Failed(f"status {int(status)}:\n{text}\n{said[-4000:]}")
        return said

    def look(self):
        """Every living process that was ever started here, the shell left out.

        Three signs, because each is missing somewhere: the mark (some processes overwrite their environment with their
        title), the shell's session, and a parent with a sign. What has lost all three was seen before.
        """
        for process in psutil.process_iter():
            if self._is_ours(process):
                for one in [process, *_quietly(partial(process.children, recursive=True), [])]:
                    self._seen[one.pid, _quietly(one.create_time, 0)] = one
        living = [one for one in self._seen.values() if _quietly(one.status, psutil.STATUS_DEAD) not in DEAD]
        return [one for one in living if one.is_running() and one.pid != self._shell.pid]

    def close(self):
        """Ends the shell and whatever was started in it."""
        for process in self.look():
            _quietly(process.kill, None)
        self._shell.kill()
        self._shell.wait()
        self._shell.stdin.close()
        self._shell.stdout.close()

    def _is_ours(self, process):
        try:
            if os.getsid(process.pid) == self._shell.pid:
                return True
        except OSError:
            return False
        return _quietly(process.environ, {}).get(MARK) == self._mark

    def _type(self, line):
        self._shell.stdin.write(f"{line}\n".encode())
        self._shell.stdin.flush()

    def _read_until(self, end, deadline):
        read = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._shell.stdout, selectors.EVENT_READ)
            while not (end.encode() in read and read.endswith(b"\n")):
                if time.monotonic() > deadline or not (selector.select(1.0) or self._shell.poll() is None):
                    break
                if chunk := self._shell.stdout.read():
                    read += chunk
                elif chunk == b"":
                    break
        return read.decode(errors="replace")


def _quietly(action, otherwise):
    """The result, or another if the process is gone or belongs to another user."""
    try:
        return action()
    except psutil.Error:
        return otherwise
