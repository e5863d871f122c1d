"""The model that a new stack gets, in a local S3 server: made once, never beside another model."""

import importlib
from pathlib import Path

import pytest

from swiftkv.bench.s3 import run_s3_server
from swiftkv.registry.registry import Registry

FOLDER = Path(__file__).parents[2] / "docker"


@pytest.fixture(scope="module")
def server():
    with run_s3_server() as running:
        yield running


@pytest.fixture
def seed(server, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return importlib.import_module("seed")


def test_empty_store_gets_a_bucket_and_a_model_that_is_production(seed, capsys) -> None:
    assert seed.main("s3://new/registry") == 0
    assert "bucket new: made" in capsys.readouterr().out
    registry = Registry("s3://new/registry")
    assert registry.list_models() == ["demo"]
    assert registry.list_aliases("demo") == {"production": "1"}
    assert registry.load_alias("demo", "production").history[-1].forced == seed.WHY
    assert seed.main("s3://new/registry") == 0
    assert registry.list_versions("demo") == ["1"]
    assert "bucket new: is there" in capsys.readouterr().out


def test_store_with_a_model_gets_none(seed, tmp_path: Path) -> None:
    seed.create_bucket("used")
    Registry("s3://used/registry").publish(seed.write_model(tmp_path), "mine")
    assert seed.main("s3://used/registry") == 0
    assert Registry("s3://used/registry").list_models() == ["mine"]
