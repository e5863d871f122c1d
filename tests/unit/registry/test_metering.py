"""What operations on versions leave as metrics: bytes, seconds, and failures that happened."""

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from swiftkv.errors import IntegrityError
from swiftkv.registry import metering
from swiftkv.registry.files import PART_BYTES

READERS = {
    "verify": lambda registry, folder: registry.verify("tiny"),
    "fetch": lambda registry, folder: registry.fetch("tiny"),
    "pull": lambda registry, folder: registry.pull("tiny", folder),
    "stream": lambda registry, folder: list(registry.stream_tensors("tiny", lambda name: True)),
}


class Recorded:
    """What was recorded, by operation."""

    def __init__(self):
        self.num_bytes, self.failures, self.seconds = Counter(), Counter(), {}

    def count(self, name, amount, operation):
        assert amount > 0, "Ray's counters refuse it"
        counters = {
            "swiftkv_registry_bytes_total": self.num_bytes,
            "swiftkv_registry_verification_failures_total": self.failures,
        }
        counters[name][operation] += amount

    def observe(self, name, value, operation):
        assert name == "swiftkv_registry_seconds"
        self.seconds.setdefault(operation, []).append(value)


@pytest.fixture
def recorded(monkeypatch):
    found = Recorded()
    monkeypatch.setattr(metering, "count", found.count)
    monkeypatch.setattr(metering, "observe", found.observe)
    return found


@pytest.fixture
def big(make_checkpoint):
    """A checkpoint whose tensors are in two parts, and its bytes on the disk."""
    folder = make_checkpoint(filler_bytes=PART_BYTES + 1000)
    return folder, sum(path.stat().st_size for path in folder.iterdir())


def damage(registry, path, change):
    """Change the last part of a file of tiny's only version."""
    entry = next(entry for entry in registry.load_manifest("tiny@1").files if entry.path == path)
    blob = f"blobs/{entry.parts[-1][:2]}/{entry.parts[-1]}"
    registry._storage.write(blob, change(registry._storage.read(blob)))


def test_bytes_are_those_of_the_files_and_what_is_there_does_not_move(registry, big, recorded, tmp_path):
    folder, num_bytes = big
    registry.publish(folder, "tiny")
    assert recorded.num_bytes == {"publish": num_bytes}
    registry.publish(folder, "tiny")
    assert recorded.num_bytes == {"publish": num_bytes}
    for _ in range(2):
        registry.fetch("tiny")
    registry.pull("tiny", tmp_path / "pulled")
    registry.verify("tiny")
    assert recorded.num_bytes == dict.fromkeys(("publish", "fetch", "pull", "verify"), num_bytes)
    assert {operation: len(seconds) for operation, seconds in recorded.seconds.items()} == {
        "publish": 2,
        "fetch": 2,
        "pull": 1,
        "verify": 1,
    }
    assert not recorded.failures


def test_streamed_bytes_are_those_that_the_store_gave(registry, big, recorded, monkeypatch):
    registry.publish(big[0], "tiny")
    given = []
    original = registry._storage.read_buffer

    def read_buffer(path):
        part = original(path)
        if path.startswith("blobs/"):
            given.append(len(bytes(part)))
        return part

    monkeypatch.setattr(registry._storage, "read_buffer", read_buffer)
    READERS["stream"](registry, None)
    assert recorded.num_bytes["stream"] == sum(given) > PART_BYTES
    assert len(recorded.seconds["stream"]) == 1


@pytest.mark.parametrize("change", [lambda part: part[:-1] + bytes([part[-1] ^ 1]), lambda part: b""], ids=["bit", "0"])
@pytest.mark.parametrize("operation", READERS)
def test_a_corrupted_file_is_one_failure_and_no_success(registry, big, recorded, tmp_path, operation, change):
    registry.publish(big[0], "tiny")
    damage(registry, "model.safetensors", change)
    with pytest.raises(IntegrityError):
        READERS[operation](registry, tmp_path / "pulled")
    assert recorded.failures == {operation: 1}
    assert recorded.seconds.keys() == {"publish"}


def test_a_damaged_copy_that_is_mended_is_no_failure_and_costs_its_part(local, big, recorded):
    folder, num_bytes = big
    local.publish(folder, "tiny")
    copy = local.fetch("tiny").path / "model.safetensors"
    content = copy.read_bytes()
    copy.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    local.fetch("tiny")
    assert recorded.num_bytes["fetch"] == num_bytes + len(content) - PART_BYTES
    assert not recorded.failures


def test_seconds_are_those_of_the_whole_operation(local, checkpoint, recorded, monkeypatch):
    read = local._storage.read_buffer
    monkeypatch.setattr(local._storage, "read_buffer", lambda path: (time.sleep(0.05), read(path))[1])
    local.publish(checkpoint, "tiny")
    started = time.perf_counter()
    local.fetch("tiny@1")
    assert recorded.seconds["fetch"] == [pytest.approx(time.perf_counter() - started, abs=0.02)]


def test_a_stream_that_is_left_is_neither_a_success_nor_a_failure(local, checkpoint, recorded):
    local.publish(checkpoint, "tiny")
    tensors = local.stream_tensors("tiny", lambda name: True)
    next(tensors)
    tensors.close()
    assert recorded.seconds.keys() == {"publish"} and not recorded.failures


def test_publishing_outside_ray_loads_no_ray(checkpoint, tmp_path):
    code = (
        "import sys; from pathlib import Path; from swiftkv.registry.registry import Registry\n"
        "Registry(sys.argv[1]).publish(Path(sys.argv[2]), 'tiny'); sys.exit('ray' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "store"), str(checkpoint)]
    assert subprocess.run(command, check=False).returncode == 0
    assert Path(tmp_path / "store" / "models" / "tiny").is_dir()
