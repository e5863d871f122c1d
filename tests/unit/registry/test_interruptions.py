"""Publishers that are killed at random moments, and publishers that race: real processes, real signals."""

import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from swiftkv.registry.registry import Registry

PUBLISH = """
import signal, sys
from pathlib import Path
from swiftkv.registry.registry import Registry

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
store, folder, version, alias = sys.argv[1:]
registry = Registry(store)
print("ready", flush=True)
sys.stdin.readline()
try:
    manifest = registry.publish(Path(folder), "tiny", version=version or None, alias=alias or None)
    print(manifest.version, flush=True)
except Exception as error:
    sys.exit(type(error).__name__)
"""

MOVE = """
import sys
from swiftkv.registry.registry import Registry

registry = Registry(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for number in range(20):
    registry.set_alias("tiny", "production", str(number % 2 + 1))
"""

MEGABYTE = 1_000_000


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that has imported everything and waits for `go`."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def run_together(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit status and last words of processes that start at the same moment."""
    for process in processes:
        go(process)
    results = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        results.append((process.returncode, (out or err).strip()))
    return results


def list_uploads(store: Path) -> list[Path]:
    return sorted(store.glob("models/tiny/versions/*/upload-*"))


def kill_publishers(store: Path, folder: Path, times: int) -> Iterator[int]:
    """Publish `times` times, each killed within the time that one takes; the unfinished uploads after each."""
    chance = random.Random(7)
    reference = start(PUBLISH, store, folder, "", "")
    begun = time.monotonic()
    assert run_together([reference])[0][0] == 0
    whole_s = time.monotonic() - begun
    for _ in range(times):
        process = start(PUBLISH, store, folder, "", "")
        go(process)
        time.sleep(chance.uniform(0, whole_s))
        process.kill()
        process.communicate()
        yield len(list_uploads(store)) - len(Registry(store).list_versions("tiny"))


def check_kills(tmp_path: Path, folder: Path, times: int) -> None:
    store = tmp_path / "store"
    registry = Registry(store)
    unfinished = list(kill_publishers(store, folder, times))
    assert max(unfinished) > 0, "every kill came too early or too late to test anything"
    survivors = registry.list_versions("tiny")
    last = registry.publish(folder, "tiny").version
    assert last == str(len(survivors) + 1), "a killed publisher took a number"
    for version in [*survivors, last]:
        registry.verify(f"tiny@{version}")
    assert len(list_uploads(store)) == len(survivors) + 1, "publishing again removes what the killed ones left"


def test_killed_publishers_leave_no_version_and_the_next_one_succeeds(tmp_path, make_checkpoint):
    check_kills(tmp_path, make_checkpoint(filler_bytes=64 * MEGABYTE), times=8)


@pytest.mark.soak
def test_two_hundred_kills(tmp_path, make_checkpoint):
    check_kills(tmp_path, make_checkpoint(filler_bytes=64 * MEGABYTE), times=200)


def test_interrupted_publisher_cleans_up(tmp_path, make_checkpoint):
    folder = make_checkpoint(filler_bytes=400 * MEGABYTE)
    process = start(PUBLISH, tmp_path / "store", folder, "", "")
    go(process)
    deadline = time.monotonic() + 60
    while not list_uploads(tmp_path / "store"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert Registry(tmp_path / "store").list_models() == []
    assert list_uploads(tmp_path / "store") == []


@pytest.mark.parametrize("attempt", range(3))
def test_of_many_publishers_of_one_version_one_wins(tmp_path, make_checkpoint, read_all, attempt):
    folders = [make_checkpoint(f"folder-{seed}", seed=seed, filler_bytes=8 * MEGABYTE) for seed in range(4)]
    results = run_together([start(PUBLISH, tmp_path / "store", folder, "1", "") for folder in folders])
    assert sorted(status for status, _ in results) == [0, 1, 1, 1], results
    assert {words for status, words in results if status} == {"VersionExistsError"}
    winner = next(number for number, (status, _) in enumerate(results) if status == 0)
    assert read_all(Registry(tmp_path / "store").fetch("tiny@1").path) == read_all(folders[winner])
    assert len(list_uploads(tmp_path / "store")) == 1, "the others' files are gone"


def test_publishers_without_a_version_get_one_each(tmp_path, make_checkpoint):
    folder = make_checkpoint(filler_bytes=MEGABYTE)
    results = run_together([start(PUBLISH, tmp_path / "store", folder, "", "production") for _ in range(4)])
    assert sorted(results) == [(0, "1"), (0, "2"), (0, "3"), (0, "4")]
    registry = Registry(tmp_path / "store")
    for version in registry.list_versions("tiny"):
        registry.verify(f"tiny@{version}")


def test_alias_moves_of_many_processes_are_all_kept(tmp_path, checkpoint):
    registry = Registry(tmp_path / "store")
    for _ in range(2):
        registry.publish(checkpoint, "tiny")
    results = run_together([start(MOVE, tmp_path / "store") for _ in range(4)])
    assert [status for status, _ in results] == [0] * 4, results
    text = (tmp_path / "store/models/tiny/aliases/production.json").read_text()
    assert len(re.findall("moved_at", text)) == 80
