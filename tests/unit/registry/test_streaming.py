"""Tensors straight from a store: those of the files, only the parts that are needed, nothing unverified."""

import json
import random

import numpy as np
import pytest
from safetensors.numpy import load, load_file, save_file

from swiftkv.errors import IntegrityError
from swiftkv.registry import files, publishing


@pytest.fixture
def published(registry, checkpoint, monkeypatch):
    """Many small tensors of odd sizes over many small parts, in two shards, beside a file that the index leaves out."""
    monkeypatch.setattr(files, "PART_BYTES", 1000)
    monkeypatch.setattr(publishing, "PART_BYTES", 1000)
    chance = random.Random(0)
    numbers = np.random.default_rng(0)
    own = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    shards = [dict(own), {}]
    for number in range(60):
        shape = (chance.choice([0, 1, 7, 500, 3000]), chance.choice([1, 3]))
        shards[number % 2][f"tensor.{number}"] = numbers.integers(0, 256, shape, dtype=np.uint8)
    names = {}
    for number, shard in enumerate(shards):
        file = f"model-{number}.safetensors"
        save_file(shard, checkpoint / file)
        names |= dict.fromkeys(shard, file)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    save_file({"tensor.1": numbers.random((4,))}, checkpoint / "consolidated.safetensors")
    registry.publish(checkpoint, "tiny")
    return registry, shards[0] | shards[1]


def rebuild(raw) -> np.ndarray:
    """The tensor, by the library that wrote it."""
    header = json.dumps({"x": raw.entry | {"data_offsets": [0, len(raw.data)]}}).encode()
    return load(len(header).to_bytes(8, "little") + header + raw.data)["x"]


def test_all_tensors_are_those_of_the_files(published):
    registry, tensors = published
    found = {raw.name: rebuild(raw) for raw in registry.stream_tensors("tiny@1", lambda name: True)}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and np.array_equal(found[name], tensor), name


def test_any_choice_reads_its_own_parts_alone_and_none_twice_in_a_row(published, monkeypatch):
    registry, tensors = published
    chance = random.Random(1)
    read: list[str] = []
    original = registry._storage.read_buffer
    monkeypatch.setattr(registry._storage, "read_buffer", lambda path: (read.append(path), original(path))[1])
    for _ in range(10):
        chosen = set(chance.sample(sorted(tensors), 5))
        read.clear()
        found = {raw.name: rebuild(raw) for raw in registry.stream_tensors("tiny@1", chosen.__contains__)}
        assert found.keys() == chosen
        assert all(np.array_equal(found[name], tensors[name]) for name in chosen)
        blobs = [path for path in read if path.startswith("blobs/")]
        most = sum(tensors[name].nbytes // 1000 + 2 for name in chosen)
        headers = 30  # of the index, and of two files with sixty tensors
        assert len(blobs) <= most + headers < len(registry.load_manifest("tiny@1").stored_blobs)


def test_a_damaged_part_is_refused_before_its_tensor_comes(published):
    registry, tensors = published
    manifest = registry.load_manifest("tiny@1")
    entry = next(entry for entry in manifest.files if entry.path == "model-1.safetensors")
    blob = f"blobs/{entry.parts[-1][:2]}/{entry.parts[-1]}"
    content = registry._storage.read(blob)
    registry._storage.write(blob, content[:-1] + bytes([content[-1] ^ 1]))
    last = len(entry.parts)
    with pytest.raises(IntegrityError, match=rf"model-1\.safetensors: part {last} of {last}: SHA-256"):
        for raw in registry.stream_tensors("tiny@1", lambda name: True):
            assert np.array_equal(rebuild(raw), tensors[raw.name])


def test_a_folder_for_streaming_holds_all_but_the_tensors(published):
    registry, _ = published
    path = registry.fetch_without_weights("tiny@1").path
    assert sorted(file.name for file in path.iterdir()) == [
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert registry.fetch("tiny@1").path != path
