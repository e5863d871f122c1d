"""Publish, find, fetch, pull, verify, aliases: in a folder, and in a store that is not one."""

import hashlib
import json
import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from swiftkv.errors import (
    CheckpointError,
    ConfigError,
    IntegrityError,
    RegistryError,
    VersionExistsError,
    VersionNotFoundError,
)
from swiftkv.registry.files import PART_BYTES
from swiftkv.registry.manifest import Provenance
from swiftkv.registry.registry import Registry
from swiftkv.registry.storage import Storage

PROVENANCE = Provenance(
    teacher={"name": "tiny-teacher"},
    recipe={"steps": 20, "optimizer": {"learning_rate": 1e-5}},
    training={"final_loss": 0.25},
    evaluation={"perplexity": {"teacher": 3.0, "student": 3.25}},
)


def find_blob(registry: Registry, path: str) -> str:
    """The object that holds a one-part file of tiny's only version."""
    entry = next(entry for entry in registry.load_manifest("tiny@1").files if entry.path == path)
    return f"blobs/{entry.parts[0][:2]}/{entry.parts[0]}"


def test_fetched_files_are_the_published_ones(registry, checkpoint, read_all):
    manifest = registry.publish(checkpoint, "tiny", provenance=PROVENANCE)
    fetched = registry.fetch("tiny")
    assert read_all(fetched.path) == read_all(checkpoint)
    assert (fetched.name, fetched.version, fetched.manifest) == ("tiny", "1", manifest)
    assert manifest.total_bytes == sum(path.stat().st_size for path in checkpoint.iterdir())


def test_manifest_says_where_a_version_came_from(registry, checkpoint):
    registry.publish(checkpoint, "tiny", provenance=PROVENANCE)
    manifest = registry.load_manifest("tiny@1")
    assert manifest.spec["hidden_size"] == 8
    assert manifest.spec["num_key_value_layers"] == 2
    assert manifest.spec["key_value_group_size"] == 2
    assert manifest.spec["head_dim"] == 4, "transformers' default: hidden size over heads"
    assert manifest.teacher == PROVENANCE.teacher
    assert manifest.recipe is not None and manifest.recipe.content == PROVENANCE.recipe
    assert manifest.training == PROVENANCE.training
    assert manifest.evaluation == PROVENANCE.evaluation
    assert "@" in manifest.publisher and manifest.code_version and manifest.published_at.tzinfo


def test_files_of_many_chunks_and_of_no_bytes_survive(registry, make_checkpoint, read_all):
    folder = make_checkpoint(filler_bytes=3 * PART_BYTES + 17)
    (folder / "empty.txt").touch()
    (folder / "licences").mkdir()
    (folder / "licences" / "NOTICE").write_text("notice")
    registry.publish(folder, "tiny")
    assert read_all(registry.fetch("tiny").path) == read_all(folder)


def test_links_to_files_are_followed_and_dot_files_left_out(registry, checkpoint, tmp_path, read_all):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in checkpoint.iterdir():
        (snapshot / path.name).symlink_to(path)
    (snapshot / ".gitattributes").write_text("x")
    registry.publish(snapshot, "tiny")
    assert read_all(registry.fetch("tiny").path) == read_all(checkpoint)


def test_a_link_that_leads_nowhere_is_refused(local, checkpoint):
    (checkpoint / "extra.json").symlink_to(checkpoint / "gone.json")
    with pytest.raises(CheckpointError, match=r"extra\.json.*broken link"):
        local.publish(checkpoint, "tiny")


def test_versions_count_up_and_sort_as_numbers(registry, checkpoint):
    for _ in range(2):
        registry.publish(checkpoint, "tiny")
    for version in ("10", "9", "1.10", "1.9"):
        registry.publish(checkpoint, "tiny", version=version)
    assert registry.list_versions("tiny") == ["1", "1.9", "1.10", "2", "9", "10"]
    assert registry.publish(checkpoint, "tiny").version == "11"
    assert registry.list_models() == ["tiny"]


def test_bare_name_is_the_newest_until_an_alias_says_otherwise(registry, checkpoint):
    registry.publish(checkpoint, "tiny", version="9")
    registry.publish(checkpoint, "tiny", version="2")
    registry.set_alias("tiny", "production", "2")
    assert registry.resolve("tiny") == ("tiny", "2")
    assert registry.resolve("tiny@production") == ("tiny", "2")
    registry.set_alias("tiny", "latest", "9")
    assert registry.resolve("tiny") == ("tiny", "9")
    assert registry.list_aliases("tiny") == {"latest": "9", "production": "2"}


def test_existing_version_is_refused_and_unharmed(registry, make_checkpoint, read_all):
    first, second = make_checkpoint("first", seed=1), make_checkpoint("second", seed=2)
    registry.publish(first, "tiny", version="1")
    with pytest.raises(VersionExistsError, match=r"tiny@1 exists already.*never change.*another version"):
        registry.publish(second, "tiny", version="1")
    assert read_all(registry.fetch("tiny@1").path) == read_all(first)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("other", "No model 'other'.*Models there: tiny"),
        ("tiny@2", "no version or alias '2'.*Versions: 1; aliases: production"),
        ("tiny@staging", "no version or alias 'staging'"),
    ],
)
def test_unknown_reference_says_what_there_is(registry, checkpoint, reference, message):
    registry.publish(checkpoint, "tiny")
    registry.set_alias("tiny", "production", "1")
    for method in (registry.resolve, registry.load_manifest, registry.fetch, registry.verify):
        with pytest.raises(VersionNotFoundError, match=message):
            method(reference)


@pytest.mark.parametrize("name", ["", "../up", "Upper", "a/b", ".hidden", "a b", "x" * 101])
def test_bad_names_are_refused(registry, checkpoint, name):
    for call in (
        lambda: registry.publish(checkpoint, name),
        lambda: registry.publish(checkpoint, "tiny", version=name),
        lambda: registry.fetch(f"{name}@1"),
        lambda: registry.fetch(f"tiny@{name}"),
        lambda: registry.set_alias("tiny", name, "1"),
    ):
        with pytest.raises(ConfigError, match="allowed are lower-case letters"):
            call()
    assert registry.list_models() == []


def test_versions_and_aliases_do_not_share_a_word(registry, checkpoint):
    registry.publish(checkpoint, "tiny", version="stable")
    registry.set_alias("tiny", "production", "stable")
    with pytest.raises(ConfigError, match="'production' is an alias"):
        registry.publish(checkpoint, "tiny", version="production")
    with pytest.raises(ConfigError, match="'latest' is an alias"):
        registry.publish(checkpoint, "tiny", version="latest")
    for alias in ("stable", "7"):
        with pytest.raises(ConfigError, match="is, or will be, a version"):
            registry.set_alias("tiny", alias, "stable")


def test_alias_to_a_version_that_does_not_exist_is_refused(registry, checkpoint):
    registry.publish(checkpoint, "tiny")
    with pytest.raises(VersionNotFoundError):
        registry.set_alias("tiny", "production", "2")
    assert registry.list_aliases("tiny") == {}


def test_concurrent_alias_moves_are_all_kept(registry, checkpoint):
    for _ in range(4):
        registry.publish(checkpoint, "tiny")
    moves = [str(number % 4 + 1) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda version: registry.set_alias("tiny", "production", version), moves))
    record = registry.load_alias("tiny", "production")  # which also checks that the history is a chain
    assert sorted(move.version for move in record.history) == sorted(moves)
    assert record.history[-1].version == record.version == registry.resolve("tiny@production")[1]


def test_reading_a_mistyped_store_creates_nothing(tmp_path):
    registry = Registry(tmp_path / "typo")
    assert registry.list_models() == []
    with pytest.raises(VersionNotFoundError, match="Models there: none"):
        registry.fetch("tiny")
    assert not (tmp_path / "typo").exists()


def test_unknown_store_scheme_is_refused():
    with pytest.raises(ConfigError, match=r"unknown scheme 'ftp'.*s3://"):
        Registry("ftp://host/models")


def test_foreign_things_in_the_store_are_not_models(local, checkpoint, tmp_path):
    local.publish(checkpoint, "tiny")
    (tmp_path / "store" / "models" / "Not A Model" / "versions" / "1").mkdir(parents=True)
    (tmp_path / "store" / "models" / "tiny" / "versions" / "no manifest").mkdir()
    (tmp_path / "store" / "models" / "tiny" / "versions" / "2").mkdir()
    assert (local.list_models(), local.list_versions("tiny")) == (["tiny"], ["1"])


def flip_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", [flip_bit, lambda content: content[:-1], lambda content: content + b"x", None])
def test_damage_in_the_store_is_named_and_never_used(registry, checkpoint, tmp_path, file, damage):
    registry.publish(checkpoint, "tiny")
    blob = find_blob(registry, file)
    content = registry._storage.read(blob)
    registry._storage.remove([blob])
    if damage is not None:
        registry._storage.write(blob, damage(content))
    found = "nothing" if damage is None else hashlib.sha256(damage(content)).hexdigest()
    sha256 = hashlib.sha256(content).hexdigest()
    message = f"{file}: part 1 of 1: SHA-256 {sha256} in the manifest, but {found} found"
    for method in (registry.verify, registry.fetch, lambda reference: registry.pull(reference, tmp_path / "pulled")):
        with pytest.raises(IntegrityError, match=re.escape(message)):
            method("tiny")
    assert not (tmp_path / "pulled").exists()
    assert [path.suffix for path in (tmp_path / "home/cache/models").iterdir() if path.is_dir()] == [".partial"]


def test_a_part_of_another_size_is_mended_by_publishing_again(registry, checkpoint):
    registry.publish(checkpoint, "tiny")
    blob = find_blob(registry, "model.safetensors")
    registry._storage.write(blob, b"cut off")
    registry.publish(checkpoint, "tiny")
    registry.verify("tiny@1")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(
            flip_bit((folder / "model.safetensors").read_bytes())
        ),
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1]),
        lambda folder: (folder / "added.json").write_text("{}"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").symlink_to("/etc/hostname")),
        shutil.rmtree,
    ],
)
def test_damaged_cache_is_downloaded_again(registry, checkpoint, read_all, damage):
    registry.publish(checkpoint, "tiny")
    damage(registry.fetch("tiny").path)
    assert read_all(registry.fetch("tiny").path) == read_all(checkpoint)


def count_reads(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the objects that are read from now on."""
    read: list[str] = []
    original = registry._storage.read_buffer

    def read_buffer(path: str):
        read.append(path)
        return original(path)

    monkeypatch.setattr(registry._storage, "read_buffer", read_buffer)
    return read


def test_only_what_is_missing_is_downloaded(registry, make_checkpoint, read_all, monkeypatch):
    folder = make_checkpoint(filler_bytes=4 * PART_BYTES)
    registry.publish(folder, "tiny")
    path = registry.fetch("tiny").path
    content = bytearray((path / "model.safetensors").read_bytes())
    content[2 * PART_BYTES] ^= 1
    (path / "model.safetensors").write_bytes(content)
    read = count_reads(registry, monkeypatch)
    assert read_all(registry.fetch("tiny").path) == read_all(folder)
    assert len([blob for blob in read if blob.startswith("blobs/")]) == 1
    read.clear()
    registry.fetch("tiny")
    assert [blob for blob in read if blob.startswith("blobs/")] == []


def test_equal_parts_are_stored_once(registry, make_checkpoint):
    registry.publish(make_checkpoint("first", filler_bytes=3 * PART_BYTES), "tiny")
    before = registry._storage.list_files("blobs")
    registry.publish(make_checkpoint("second", filler_bytes=3 * PART_BYTES), "other")
    assert registry._storage.list_files("blobs") == before, "not even written again"


def test_pull_refuses_a_folder_that_exists_and_goes_on_where_it_was(
    registry, make_checkpoint, tmp_path, read_all, monkeypatch
):
    folder = make_checkpoint(filler_bytes=6 * PART_BYTES)
    registry.publish(folder, "tiny")
    with pytest.raises(ConfigError, match="exists already"):
        registry.pull("tiny", tmp_path)
    read = count_reads(registry, monkeypatch)

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registry.pull("tiny", tmp_path / "pulled", on_progress=stop)
    assert not (tmp_path / "pulled").exists()
    registry.pull("tiny", tmp_path / "pulled")
    assert read_all(tmp_path / "pulled") == read_all(folder)
    blobs = [path for path in read if path.startswith("blobs/")]
    assert len(blobs) == len(set(blobs)), "a part was read twice"


def test_equal_bytes_share_a_cache_folder_and_different_ones_do_not(make_checkpoint):
    registry = Registry("memory:///")
    for seed in (1, 1, 2):
        registry.publish(make_checkpoint(f"seed-{seed}-{len(registry.list_versions('tiny'))}", seed=seed), "tiny")
    paths = [registry.fetch(f"tiny@{version}").path for version in "123"]
    assert paths[0] == paths[1] != paths[2]


def test_a_pickle_in_disguise_is_refused_whoever_published_it(registry, checkpoint, monkeypatch):
    (checkpoint / "model.safetensors").write_bytes(pickle.dumps({"weights": [1]}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        registry.publish(checkpoint, "tiny")
    with monkeypatch.context() as context:
        context.setattr("swiftkv.registry.registry.check_checkpoint", lambda *_: {"hidden_size": 8})
        registry.publish(checkpoint, "tiny")
    with pytest.raises(IntegrityError, match=r"model\.safetensors: not a readable safetensors file"):
        registry.fetch("tiny")


@pytest.mark.parametrize("path", ["../../../../escaped", "/etc/escaped", "a/../../escaped", "a\\..\\b", ".", ""])
def test_manifest_with_a_path_that_climbs_out_is_refused(registry, checkpoint, tmp_path, path):
    manifest = registry.publish(checkpoint, "tiny")
    values = json.loads(manifest.to_json())
    values["files"][0]["path"] = path
    registry._storage.swap("models/tiny/versions/1/manifest.json", lambda _: json.dumps(values).encode())
    with pytest.raises(IntegrityError, match="unsafe file path"):
        registry.fetch("tiny@1")
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"format": 3}, RegistryError, "format 3, but this swiftkv reads 2.*newer swiftkv"),
        ({"format": 1}, RegistryError, "format 1.*Publish the folder again"),
        ({"version": "2"}, IntegrityError, "it is the manifest of tiny@2"),
        ({"surprise": 1}, IntegrityError, "surprise"),
        ({"files": []}, IntegrityError, "files"),
        ({"part_bytes": 0}, IntegrityError, "part_bytes"),
        ({"part_bytes": 1}, IntegrityError, "parts, where its size needs"),
    ],
)
def test_manifest_that_cannot_be_trusted_is_refused(local, checkpoint, changes, error, message):
    values = json.loads(local.publish(checkpoint, "tiny").to_json()) | changes
    local._storage.swap("models/tiny/versions/1/manifest.json", lambda _: json.dumps(values).encode())
    with pytest.raises(error, match=message):
        local.fetch("tiny@1")


def test_progress_counts_every_byte(registry, checkpoint):
    seen: list[tuple[int, int]] = []
    manifest = registry.publish(checkpoint, "tiny", on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (manifest.total_bytes, manifest.total_bytes)
    assert seen == sorted(seen)
    seen.clear()
    registry.fetch("tiny", on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (manifest.total_bytes, manifest.total_bytes)


def test_failed_publish_leaves_no_version_and_no_lease(local, checkpoint, tmp_path, read_all):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        local.publish(checkpoint, "tiny", on_progress=stop)
    left = read_all(tmp_path / "store")
    assert all(path.startswith("blobs/") for path in left), left


class LosesAnswers(Storage):
    """A store that takes every manifest, and whose answer to it is lost on the way."""

    def create(self, path: str, content: bytes) -> bool:
        super().create(path, content)
        raise RegistryError("connection reset")


def test_publish_whose_answer_was_lost_succeeds(checkpoint, tmp_path):
    registry = Registry(tmp_path / "store")
    registry._storage = LosesAnswers(tmp_path / "store")
    registry.publish(checkpoint, "tiny", version="1")
    assert registry.verify("tiny@1").version == "1"
    with pytest.raises(VersionExistsError):
        registry.publish(checkpoint, "tiny", version="1")
