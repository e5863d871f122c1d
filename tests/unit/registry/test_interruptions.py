"""Publishers, pullers and movers that are killed at random moments or race: real processes, real signals."""

import hashlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from swiftkv.errors import RegistryError
from swiftkv.registry import leases
from swiftkv.registry.registry import Registry

PREAMBLE = """
import signal, sys
from pathlib import Path
from swiftkv.registry.registry import Registry

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
registry = Registry(sys.argv[1])
arguments = sys.argv[2:]
print("ready", flush=True)
sys.stdin.readline()
"""
PUBLISH = (
    PREAMBLE
    + """
try:
    print(registry.publish(Path(arguments[0]), "tiny", version=arguments[1] or None).version, flush=True)
except Exception as error:
    sys.exit(type(error).__name__)
"""
)
FETCH = (
    PREAMBLE
    + """
print(registry.fetch(arguments[0]).path)
"""
)
PULL = (
    PREAMBLE
    + """
registry.pull(arguments[0], Path(arguments[1]))
"""
)
MOVE = (
    PREAMBLE
    + """
for number in range(int(arguments[0])):
    registry.set_alias("tiny", "production", str(number % 2 + 1))
"""
)

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
        out, err = process.communicate(timeout=300)
        results.append((process.returncode, (out or err).strip()))
    return results


def measure(process: subprocess.Popen[str]) -> float:
    """Seconds that the work of a process takes."""
    begun = time.monotonic()
    assert run_together([process])[0][0] == 0
    return time.monotonic() - begun


def kill_within(process: subprocess.Popen[str], seconds: float, chance: random.Random) -> None:
    go(process)
    time.sleep(chance.uniform(0, seconds))
    process.kill()
    process.communicate()


def hash_folder(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def find_missing_blobs(registry: Registry) -> set[str]:
    """Blobs that a manifest names and the store lacks, or has in another size."""
    there = {path.rsplit("/", 1)[-1]: info.size_bytes for path, info in registry._storage.list_files("blobs").items()}
    manifests = [registry.load_manifest(f"tiny@{version}") for version in registry.list_versions("tiny")]
    return {blob for manifest in manifests for blob, size in manifest.stored_blobs.items() if there.get(blob) != size}


def check_kills(store: str, make_checkpoint: Callable[..., Path], tmp_path: Path, times: int) -> None:
    """Kill publishers, pullers and cache fillers in turn, each within the time that it takes."""
    chance = random.Random(7)
    folders = [make_checkpoint(f"seed-{seed}", seed=seed, filler_bytes=64 * MEGABYTE) for seed in range(times // 3 + 2)]
    expected = [hash_folder(folder) for folder in folders]
    registry = Registry(store)
    publish_s = measure(start(PUBLISH, store, folders[0], "first"))
    pull_s = measure(start(PULL, store, "tiny@first", tmp_path / "whole"))
    unfinished = 0
    for number in range(times):
        turn, target = number % 3, tmp_path / f"pulled-{number // 9}"
        if turn == 0:
            kill_within(start(PUBLISH, store, folders[number // 3 + 1], f"v{number}"), publish_s, chance)
            unfinished += f"v{number}" not in registry.list_versions("tiny")
            assert find_missing_blobs(registry) == set(), "a torn version"
        elif turn == 1 and not target.exists():
            kill_within(start(PULL, store, "tiny@first", target), pull_s, chance)
            unfinished += not target.exists()
            assert not target.exists() or hash_folder(target) == expected[0]
        else:
            kill_within(start(FETCH, store, "tiny@first"), pull_s, chance)
            cached = tmp_path / "home/cache/models" / registry.load_manifest("tiny@first").digest
            assert not cached.exists() or hash_folder(cached) == expected[0]
    assert unfinished > times / 6, "most kills came too early or too late to test anything"
    begun = time.monotonic()
    for number in range(0, times, 3):
        if f"v{number}" not in registry.list_versions("tiny"):
            registry.publish(folders[number // 3 + 1], "tiny", version=f"v{number}")
        registry.verify(f"tiny@v{number}")
        assert hash_folder(registry.fetch(f"tiny@v{number}").path) == expected[number // 3 + 1]
    assert hash_folder(registry.fetch("tiny@first").path) == expected[0]
    assert time.monotonic() - begun < 60 + times * (publish_s + pull_s) * 4, "something waited for a dead process"


def test_killed_at_random_moments(store, make_checkpoint, tmp_path):
    check_kills(store, make_checkpoint, tmp_path, times=9)


@pytest.mark.soak
def test_two_hundred_kills(store, make_checkpoint, tmp_path):
    check_kills(store, make_checkpoint, tmp_path, times=200)


def test_gc_clears_what_killed_publishers_left(store, make_checkpoint, monkeypatch):
    registry = Registry(store)
    registry.publish(make_checkpoint("kept"), "tiny")
    kept = registry._storage.list_files("blobs").keys()
    process = start(PUBLISH, store, make_checkpoint("lost", seed=1, filler_bytes=300 * MEGABYTE), "")
    go(process)
    while registry._storage.list_files("blobs").keys() == kept:
        assert process.poll() is None
    process.kill()
    process.communicate()
    monkeypatch.setattr(leases, "PATIENCE_S", 0.0)
    with pytest.raises(RegistryError, match=r"publishes, moves an alias or removes at this moment"):
        registry.collect(keep=5)
    monkeypatch.setattr(leases, "LEASE_S", 2.0)
    time.sleep(4)  # S3 tells whole seconds, and a busy server may take the killed one's last renewal late
    assert registry.collect(keep=5).num_blobs > 0
    assert registry._storage.list_files("blobs").keys() == kept
    assert registry._storage.list_files("leases").keys() == set()
    registry.verify("tiny@1")


def test_a_publisher_waits_for_a_collector_and_loses_nothing(store, make_checkpoint):
    """The collector is about to remove a blob that the publisher finds, and so does not send."""
    registry = Registry(store)
    folder = make_checkpoint()
    registry.publish(folder, "tiny")
    registry.publish(make_checkpoint("newer", seed=1), "tiny")
    with leases.collecting(registry._storage):
        process = start(PUBLISH, store, folder, "again")
        go(process)
        time.sleep(2)
        assert process.poll() is None and registry.list_versions("tiny") == ["1", "2"]
        unused = [path for path in registry._storage.list_files("blobs")]
        registry._storage.remove([f"blobs/{path}" for path in unused])
    assert process.communicate(timeout=60)[0] == "again\n"
    assert registry.verify("tiny@again")


def test_interrupted_publisher_leaves_no_version_and_no_lease(store, make_checkpoint):
    registry = Registry(store)
    process = start(PUBLISH, store, make_checkpoint(filler_bytes=400 * MEGABYTE), "")
    go(process)
    deadline = time.monotonic() + 60
    while not registry._storage.list_files("blobs"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert registry.list_models() == [] and registry._storage.list_files("leases") == {}


def test_of_many_publishers_of_one_version_one_wins(store, make_checkpoint):
    folders = [make_checkpoint(f"folder-{seed}", seed=seed, filler_bytes=8 * MEGABYTE) for seed in range(4)]
    results = run_together([start(PUBLISH, store, folder, "1") for folder in folders])
    assert sorted(status for status, _ in results) == [0, 1, 1, 1], results
    assert {words for status, words in results if status} == {"VersionExistsError"}
    winner = next(number for number, (status, _) in enumerate(results) if status == 0)
    assert hash_folder(Registry(store).fetch("tiny@1").path) == hash_folder(folders[winner])


def test_publishers_without_a_version_get_one_each(store, make_checkpoint):
    folder = make_checkpoint(filler_bytes=MEGABYTE)
    results = run_together([start(PUBLISH, store, folder, "") for _ in range(4)])
    assert sorted(results) == [(0, "1"), (0, "2"), (0, "3"), (0, "4")]
    registry = Registry(store)
    for version in registry.list_versions("tiny"):
        registry.verify(f"tiny@{version}")


def test_concurrent_fetches_download_once(store, make_checkpoint, tmp_path):
    """Each process says what it read from the store; together they read each blob once."""
    registry = Registry(store)
    registry.publish(make_checkpoint(filler_bytes=100 * MEGABYTE), "tiny")
    counting = (
        PREAMBLE
        + """
from swiftkv.registry.storage import Storage
read, original = [], Storage.read_buffer
Storage.read_buffer = lambda self, path: (read.append(path), original(self, path))[1]
registry.fetch("tiny")
print(sum(path.startswith("blobs/") for path in read))
"""
    )
    results = run_together([start(counting, store) for _ in range(4)])
    counts = [int(words) for status, words in results if status == 0]
    assert len(counts) == 4, results
    assert sorted(counts) == [0, 0, 0, len(registry.load_manifest("tiny").stored_blobs)]


def test_alias_moves_of_fifty_processes_are_a_chain(store, checkpoint):
    registry = Registry(store)
    for _ in range(2):
        registry.publish(checkpoint, "tiny")
    movers = [start(MOVE, store, 2) for _ in range(50)]
    results = run_together(movers)
    assert {status for status, _ in results} == {0}, results
    record = registry.load_alias("tiny", "production")
    assert len(record.history) == 100
    versions = [move.version for move in record.history]
    assert [move.previous for move in record.history] == [None, *versions[:-1]], "read_alias checks it as well"


def test_a_version_that_is_promoted_while_it_is_collected_stays(store, checkpoint):
    """Collectors and movers in a race: whatever comes first, the alias means a version that is there."""
    registry = Registry(store)
    for _ in range(3):
        registry.publish(checkpoint, "tiny")
    move = (
        PREAMBLE
        + """
import contextlib
from swiftkv.errors import VersionNotFoundError
with contextlib.suppress(VersionNotFoundError):
    registry.set_alias("tiny", arguments[0], arguments[1])
"""
    )
    collect = PREAMBLE + "registry.collect(keep=1)"
    results = run_together([start(collect, store), *(start(move, store, f"alias-{n}", "1") for n in range(3))])
    assert {status for status, _ in results} == {0}, results
    for alias, version in registry.list_aliases("tiny").items():
        assert registry.verify(f"tiny@{alias}").version == version
    assert "1" in registry.list_versions("tiny") or registry.list_aliases("tiny") == {}
