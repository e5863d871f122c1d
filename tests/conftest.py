"""Fixtures that more than one test file uses. Holds no models: `fakes` writes them."""

import os
from pathlib import Path

import pytest
import torch

# Tests bring their own models; a name that is no folder must fail at once instead of asking a server.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Tiny matrices on one thread: sums in the same order on any machine, and no spinning against other
    processes (60 times slower with both cores taken, when measured). Engines set their own threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder of this test run, for checkpoints that several tests share."""
    return tmp_path_factory.mktemp("models")
