"""What goes wrong around the registry: full disks, lost answers, processes that slept, stores that others wrote to."""

import json
import os

import pytest
from typer.testing import CliRunner

from swiftkv.cli.main import app
from swiftkv.errors import ConfigError, IntegrityError, RegistryError, VersionNotFoundError
from swiftkv.registry import collecting, files, leases
from swiftkv.registry.files import PART_BYTES
from swiftkv.registry.registry import Registry
from swiftkv.registry.storage import Storage


def test_a_disk_that_takes_half_a_write_gives_whole_files_or_an_error(local, make_checkpoint, tmp_path, monkeypatch):
    folder = make_checkpoint(filler_bytes=PART_BYTES)
    local.publish(folder, "tiny")
    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, part, start: original(fd, part[: max(1, len(part) // 2)], start))
    local.pull("tiny", tmp_path / "pulled")
    assert (tmp_path / "pulled/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_publisher_that_slept_finds_its_blobs_again(registry, checkpoint, monkeypatch):
    """It is taken for dead before its manifest, once, and gc takes its blobs; then again right after the manifest."""
    sleeps = iter([False, True, False])

    def is_fresh(lease: leases.Lease) -> bool:
        fresh = next(sleeps)
        if not fresh:
            registry._storage.remove([f"blobs/{path}" for path in registry._storage.list_files("blobs")])
        return fresh

    monkeypatch.setattr(leases.Lease, "is_fresh", is_fresh)
    registry.publish(checkpoint, "tiny")
    assert next(sleeps, None) is None
    registry.verify("tiny@1")


def test_a_collector_that_slept_removes_nothing(registry, make_checkpoint, monkeypatch):
    for seed in range(3):
        registry.publish(make_checkpoint(f"seed-{seed}", seed=seed), "tiny")
    monkeypatch.setattr(leases.Lease, "is_fresh", lambda lease: False)
    with pytest.raises(RegistryError, match="slept too long"):
        registry.collect(keep=1)
    assert registry.list_versions("tiny") == ["1", "2", "3"]


class RepeatsSwaps(Storage):
    """A client that repeats a request whose answer was lost, and so meets its own write."""

    def swap(self, path: str, change) -> None:
        super().swap(path, change)
        super().swap(path, change)
        if path.endswith("lost.json"):
            raise RegistryError("timed out")


def test_a_move_whose_answer_was_lost_happens_once(checkpoint, tmp_path):
    registry = Registry(tmp_path / "store")
    registry._storage = RepeatsSwaps(tmp_path / "store")
    for _ in range(3):
        registry.publish(checkpoint, "tiny")
    for alias in ("production", "lost"):
        for version in "123":
            registry.set_alias("tiny", alias, version)
        assert registry.rollback("tiny", alias) == "2"
        assert [move.version for move in registry.load_alias("tiny", alias).history] == ["1", "2", "3", "2"]


def test_a_rollback_to_what_was_removed_is_refused(registry, checkpoint):
    for _ in range(3):
        registry.publish(checkpoint, "tiny")
    for version in "123":
        registry.set_alias("tiny", "production", version)
    registry.collect(keep=1)
    assert registry.rollback("tiny", "production") == "2"
    with pytest.raises(VersionNotFoundError, match="meant 1 before, which `swiftkv models gc` removed"):
        registry.rollback("tiny", "production")
    assert registry.resolve("tiny@production") == ("tiny", "2")


def test_an_intact_copy_with_a_hole_is_intact(local, make_checkpoint, monkeypatch):
    folder = make_checkpoint()
    with (folder / "zeros.bin.txt").open("wb") as file:
        file.write(bytes(2 * PART_BYTES))
    local.publish(folder, "tiny")
    path = local.fetch("tiny").path / "zeros.bin.txt"
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2 * PART_BYTES)
    monkeypatch.setattr("swiftkv.registry.cache._download", lambda *_: pytest.fail("downloaded again"))
    local.fetch("tiny")


def test_a_damaged_copy_is_not_changed_under_who_reads_it(local, checkpoint):
    local.publish(checkpoint, "tiny")
    path = local.fetch("tiny").path / "config.json"
    right = path.read_bytes()
    path.write_bytes(b"damaged")
    with path.open("rb") as reader:
        assert local.fetch("tiny").path / "config.json" == path
        assert (reader.read(), path.read_bytes()) == (b"damaged", right)


def test_a_manifest_that_cannot_be_read_hides_no_other(registry, checkpoint, monkeypatch, tmp_path):
    for _ in range(3):
        registry.publish(checkpoint, "tiny")
    registry._storage.write("models/tiny/versions/3/manifest.json", b'{"format": 1}')
    assert registry.resolve("tiny") == ("tiny", "2")
    monkeypatch.setattr("swiftkv.cli.models.open_registry", lambda _: registry)
    shown = CliRunner().invoke(app, ["models", "list"], catch_exceptions=False, env={"COLUMNS": "200"}).stdout
    assert "tiny@1" in shown and "tiny@2" in shown and "unreadable" in shown and "Publish the folder again" in shown


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"modeling.py": b"import os"}, r"code \(modeling\.py\)"),
        ({"pytorch_model.bin": b"\x80\x04"}, r"pickled files \(pytorch_model\.bin\)"),
        ({"model.safetensors": b"\x80\x04K\x01."}, r"model\.safetensors: not a readable safetensors file"),
        ({"model.safetensors": b""}, r"model\.safetensors: not a readable safetensors file"),
        (
            {"model.safetensors.index.json": json.dumps({"weight_map": {"a": "other.safetensors"}}).encode()},
            r"names other\.safetensors, which the version lacks",
        ),
    ],
)
def test_what_may_not_be_loaded_is_not_streamed_either(registry, checkpoint, monkeypatch, damage, message):
    for name, content in damage.items():
        (checkpoint / name).write_bytes(content)
    with monkeypatch.context() as context:
        context.setattr("swiftkv.registry.registry.check_checkpoint", lambda *_: {"hidden_size": 8})
        registry.publish(checkpoint, "tiny")
    with pytest.raises(IntegrityError, match=message):
        registry.fetch_without_weights("tiny")
        list(registry.stream_tensors("tiny", lambda name: True))


def test_numbers_go_on_from_the_highest_however_far_empty_folders_go(local, checkpoint, tmp_path):
    (tmp_path / "store/models/tiny/versions/20261122").mkdir(parents=True)
    assert local.publish(checkpoint, "tiny").version == "1"


def test_a_figure_that_is_no_number_stays_visible(registry, checkpoint):
    registry.publish(checkpoint, "tiny")
    registry.add_evaluation("tiny", {"kl_nats": float("nan")})
    assert registry.list_evaluations("tiny@1")[0].figures == {"kl_nats": "NaN"}


@pytest.mark.parametrize("store", ["", "s3://bu cket", "ftp://host/x"])
def test_stores_that_cannot_be_are_refused_in_a_line(store):
    with pytest.raises((ConfigError, RegistryError)):
        Registry(store).list_models()


def test_no_credentials_and_no_server_are_told_apart(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    storage = Storage("s3://bucket")
    error = storage._explain("list", "", OSError("Error performing PUT http://169.254.169.254/latest/api/token"))
    assert "no credentials. Set AWS_ACCESS_KEY_ID" in str(error)


def test_pulling_where_no_folder_can_be_says_so(local, checkpoint, tmp_path):
    local.publish(checkpoint, "tiny")
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match="cannot be written"):
        local.pull("tiny", tmp_path / "file" / "below")


def test_removing_what_is_gone_already_is_no_error(registry):
    registry._storage.write("a", b"1")
    registry._storage.remove(["gone", "a", "also-gone"])
    assert registry._storage.read("a") is None


def test_constants_that_others_rely_on():
    assert files.PART_BYTES == 8 * 2**20, "the README says so"
    assert leases.RENEW_S * 5 <= leases.LEASE_S and collecting._BATCH <= 1000, "S3 takes a thousand in one request"
