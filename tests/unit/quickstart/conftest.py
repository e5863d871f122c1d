"""The quickstart's scripts as modules, and a small corpus that several tests read."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[3] / "examples" / "quickstart"
NUM_MODULES = 120


def load_script(name: str) -> ModuleType:
    """examples/quickstart/<name>.py, which is no package, as a module."""
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def corpus_script() -> ModuleType:
    return load_script("corpus")


@pytest.fixture(scope="session")
def teacher_script() -> ModuleType:
    return load_script("teacher")


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))  # it imports scripts beside it
    return load_script("run")


@pytest.fixture(scope="session")
def corpus_folder(corpus_script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of NUM_MODULES modules. Tests read it and write nothing there."""
    folder = tmp_path_factory.mktemp("quickstart") / "corpus"
    corpus_script.build_corpus(folder, limit_modules=NUM_MODULES)
    return folder
