"""docker/ as its programs see it: its folder on the path, and a folder that `make env` has filled."""

import importlib
import shutil
from pathlib import Path
from types import ModuleType

import pytest

DOCKER = Path(__file__).parents[2] / "docker"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """docker/check.py."""
    monkeypatch.syspath_prepend(str(DOCKER))
    return importlib.import_module("check")


@pytest.fixture
def prepare(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """docker/prepare.py, with no Docker to ask."""
    module = importlib.import_module("prepare")
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    return module


@pytest.fixture
def filled(prepare: ModuleType, tmp_path: Path) -> Path:
    """A folder such as docker/ is after `make env`."""
    shutil.copy(DOCKER / ".env.example", tmp_path)
    shutil.copytree(DOCKER / "serve", tmp_path / "serve")
    prepare.prepare(tmp_path)
    return tmp_path
