"""Which folder an engine is given."""

import pytest

from swiftkv.errors import CheckpointError, RegistryError
from swiftkv.serving.config import PoolSettings, ServeSettings
from swiftkv.serving.source import resolve_model


@pytest.fixture
def folder(tmp_path):
    checkpoint = tmp_path / "tiny"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "model.safetensors").touch()
    return checkpoint


def test_folder_is_taken_as_it_is_and_named_after_itself(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    resolved = resolve_model(ServeSettings(model="./tiny", port=8123))
    assert (resolved.model, resolved.model_id, resolved.port) == (str(folder), "tiny", 8123)


def test_given_id_wins(folder):
    assert resolve_model(PoolSettings(model=str(folder), model_id="mine")).model_id == "mine"


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_folder_without_config_or_safetensors_is_refused(folder, missing):
    (folder / missing).unlink()
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"\.safetensors"):
        resolve_model(PoolSettings(model=str(folder)))


def test_unknown_name_is_the_registry_s_error(tmp_path):
    with pytest.raises(RegistryError, match="absent"):
        resolve_model(PoolSettings(model="absent", store=str(tmp_path / "store")))
