"""The quickstart's journey where it serves: what is shown while requests run, and that nothing is left running."""

import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

COMMAND = """\
import sys, time
open({log!r}, "a").write(" ".join(sys.argv[1:2]) + "\\n")
if sys.argv[1] == "top":
    time.sleep(0.5)
    sys.exit({status})
"""


class Client:
    """Answers at once, and counts how often it was asked."""

    def __init__(self, **_: Any) -> None:
        self.asked = 0
        self.models = SimpleNamespace(list=lambda: [SimpleNamespace(id="quickstart")])
        self.completions = SimpleNamespace(create=self._create)

    def _create(self, stream: bool = False, **_: Any) -> Any:
        time.sleep(0.01)
        self.asked += 1
        choice = SimpleNamespace(text="x")
        if stream:
            return [SimpleNamespace(choices=[choice])]
        return SimpleNamespace(choices=[choice], usage=SimpleNamespace(prompt_tokens=1))


@pytest.fixture
def serve(run_script: ModuleType, tmp_path, monkeypatch):
    """Serves and calls with stand-ins for the commands; the client, or what was raised."""
    client = Client()
    monkeypatch.setattr(run_script, "OpenAI", lambda **_: client)
    monkeypatch.setattr(run_script, "BUSY_S", 0.0)

    def run(status: int) -> Client:
        log = tmp_path / "log"
        command = [sys.executable, "-c", COMMAND.format(log=str(log), status=status)]
        monkeypatch.setattr(run_script, "SWIFTKV", command)
        prompt = {"ids": [1], "text": "a", "expected": "x", "has_chat": False}
        try:
            run_script._serve_and_call(prompt)
        finally:
            assert log.read_text().split() == ["serve", "top", "down"]
        return client

    return run


def test_top_is_shown_while_requests_run_and_before_all_is_stopped(serve, capsys) -> None:
    assert serve(status=0).asked > 10
    assert "$ swiftkv top --once" in capsys.readouterr().out


def test_a_top_that_fails_stops_the_quickstart_and_what_is_served(serve) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        serve(status=2)
