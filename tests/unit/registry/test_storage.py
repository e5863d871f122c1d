"""What a store promises where others write to it at the same moment, and what it says when it refuses."""

import pytest

from swiftkv.errors import RegistryError
from swiftkv.registry import storage as storage_module
from swiftkv.registry.storage import Storage


@pytest.mark.parametrize("there", [b"1", None])
def test_swap_starts_again_when_another_writer_was_first(there):
    storage = Storage("memory:///")
    if there is not None:
        storage.create("alias", there)
    seen: list[bytes | None] = []

    def change(content: bytes | None) -> bytes:
        seen.append(content)
        if len(seen) == 1:
            storage.write("alias", b"2")
        return (content or b"") + b"x"

    storage.swap("alias", change)
    assert (seen, storage.read("alias")) == ([there, b"2"], b"2x")


def test_swap_gives_up_with_an_error(monkeypatch):
    monkeypatch.setattr(storage_module, "_SWAP_PAUSE_S", 0.0)
    storage = Storage("memory:///")

    def change(content: bytes | None) -> bytes:
        storage.write("alias", b"other")
        return b"mine"

    with pytest.raises(RegistryError, match=r"alias: other writers were first"):
        storage.swap("alias", change)
    assert storage.read("alias") == b"other"


@pytest.mark.parametrize("location", ["folder", "memory:///"])
def test_create_is_won_once_and_remove_takes_only_what_is_named(location, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage = Storage(location)
    assert [storage.create(path, b"1") for path in ("a/b", "a/b", "ab/c")] == [True, False, True]
    storage.remove(["a/b"])
    storage.remove(["a/b"])
    assert {path: info.size_bytes for path, info in storage.list_files("").items()} == {"ab/c": 1}
    assert storage.find_size("a/b") is None and storage.read("a/b") is None


@pytest.mark.parametrize("location", ["folder", "memory:///"])
def test_an_unchanged_object_is_not_read_again(location, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage = Storage(location)
    with pytest.raises(FileNotFoundError):
        storage.read_if_changed("a", None)
    storage.write("a", b"1")
    content, tag = storage.read_if_changed("a", None)
    assert content == b"1" and storage.read_if_changed("a", tag) is None
    storage.write("a", b"2")
    assert storage.read_if_changed("a", tag)[0] == b"2"


def test_store_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RegistryError, match=r"file/below: cannot (create|open)"):
        Storage(tmp_path / "file" / "below").create("a", b"1")


@pytest.mark.parametrize("location", ["new/folder", "there", "memory:///"])
def test_trying_to_write_leaves_nothing(location, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    storage = Storage(location)
    storage.check_writable("usage")
    assert storage.list_files("") == {}
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["there"]


def test_trying_to_write_where_it_cannot_be_says_so_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RegistryError, match=r"file/below: cannot write usage/check-"):
        Storage(tmp_path / "file" / "below").check_writable("usage")
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


def test_a_bucket_is_tried_by_writing_to_it(store):
    storage = Storage(store)
    storage.check_writable("usage")
    assert storage.list_files("") == {}
    if store.startswith("s3://"):
        with pytest.raises(RegistryError, match="s3://absent: cannot write usage/check-"):
            Storage("s3://absent").check_writable("usage")
