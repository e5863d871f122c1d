"""The node's cache: within its size, the oldest goes first, what is in use stays."""

import os
import shutil
from pathlib import Path

import pytest

from swiftkv.errors import ConfigError, RegistryError

MEGABYTE = 1_000_000


@pytest.fixture
def versions(local, make_checkpoint):
    """Four versions of ten megabytes each."""
    for seed in range(4):
        local.publish(make_checkpoint(f"seed-{seed}", seed=seed, filler_bytes=10 * MEGABYTE), "tiny")
    return local


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "home/cache/models"


def list_copies(cache: Path, registry) -> list[str]:
    digests = {registry.load_manifest(f"tiny@{version}").digest: version for version in "1234"}
    return sorted(digests[path.name] for path in cache.iterdir() if path.is_dir())


def fetch(registry, version: str, used_at: float) -> None:
    fetched = registry.fetch(f"tiny@{version}")
    fetched.copy.release()
    os.utime(fetched.path.with_suffix(".used"), (used_at, used_at))


def test_the_least_recently_used_goes_first(versions, cache, monkeypatch):
    monkeypatch.setenv("SWIFTKV_CACHE_GB", "0.025")
    fetch(versions, "1", 100)
    fetch(versions, "2", 200)
    fetch(versions, "1", 300)
    fetch(versions, "3", 400)
    assert list_copies(cache, versions) == ["1", "3"]
    assert sorted(path.suffix for path in cache.iterdir() if path.is_file()).count(".used") == 2


def test_what_is_in_use_stays(versions, cache, monkeypatch):
    monkeypatch.setenv("SWIFTKV_CACHE_GB", "0.025")
    held = versions.fetch("tiny@1")
    for number, version in enumerate("234"):
        fetch(versions, version, 1e9 + number)
    assert list_copies(cache, versions) == ["1", "4"]
    held.copy.release()


def test_what_was_left_half_downloaded_goes_too(versions, cache, monkeypatch):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        versions.fetch("tiny@1", on_progress=stop)
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [".partial"]
    monkeypatch.setenv("SWIFTKV_CACHE_GB", "0.015")
    fetch(versions, "2", 1)
    assert list_copies(cache, versions) == ["2"]


def test_a_version_larger_than_the_cache_is_refused(versions, monkeypatch):
    monkeypatch.setenv("SWIFTKV_CACHE_GB", "0.005")
    with pytest.raises(RegistryError, match=r"has 0\.0 GB, and the cache holds 0\.0\. Set SWIFTKV_CACHE_GB"):
        versions.fetch("tiny@1")


def test_a_full_disk_is_told_before_anything_is_written(versions, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=5 * MEGABYTE)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RegistryError, match=r"0\.0 GB are needed and 0\.0 GB are free"):
        versions.fetch("tiny@1")
    with pytest.raises(RegistryError, match="are free"):
        versions.pull("tiny@1", tmp_path / "pulled")


@pytest.mark.parametrize("value", ["many", "0", "-1", "nan"])
def test_a_limit_that_is_none_is_refused(versions, monkeypatch, value):
    monkeypatch.setenv("SWIFTKV_CACHE_GB", value)
    with pytest.raises(ConfigError, match="SWIFTKV_CACHE_GB="):
        versions.fetch("tiny@1")
