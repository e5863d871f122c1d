"""Teachers by folder and by name; the hub's answers are put in the place of its two download functions."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from swiftkv.distill.recipe import Recipe
from swiftkv.distill.teachers import (
    KNOWN_TEACHERS,
    count_weight_bytes,
    load_teacher_config,
    load_teacher_spec,
    resolve_teacher,
)
from swiftkv.errors import CheckpointError, ConfigError

PARAMETERS = {
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
}
"""As the hub's pages give them."""


def build_recipe(teacher: str | Path, kept: int | None = None) -> Recipe:
    return Recipe.model_validate(
        {
            "teacher": str(teacher),
            "cut": {"num_key_value_layers": kept},
            "data": {"train": [{"files": ["a.jsonl"]}]},
            "training": {"steps": 1},
        }
    )


def refuse(error: type[Exception]) -> Callable[..., str]:
    def download(*_: Any, **__: Any) -> str:
        if issubclass(error, RepositoryNotFoundError):
            raise error("403", response=httpx.Response(403, request=httpx.Request("GET", "https://hub.test")))
        raise error("no connection")

    return download


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """A hub with one model, a tiny Llama; what was downloaded of it whole."""
    folder, snapshots = fakes.write_teacher(tmp_path / "hub"), []

    def download_config(name: str, file: str, revision: str | None = None) -> str:
        return str(folder / file)

    def download_snapshot(name: str, **settings: Any) -> str:
        snapshots.append({"name": name} | settings)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download_config)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download_snapshot)
    return snapshots


@pytest.mark.parametrize("name", PARAMETERS)
def test_known_shapes_have_as_many_weights_as_the_published_models(name: str) -> None:
    import transformers

    config = KNOWN_TEACHERS[name]
    with torch.device("meta"):
        hf_config = transformers.AutoConfig.for_model(**config)
        model = transformers.AutoModelForCausalLM.from_config(hf_config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_a_folder_is_itself_and_its_cut_is_read_from_it(tmp_path: Path) -> None:
    folder = fakes.write_teacher(tmp_path / "teacher")
    assert resolve_teacher(folder) == folder
    spec = load_teacher_spec(build_recipe(folder))
    assert (spec.num_key_value_layers, spec.shape.num_hidden_layers, spec.shape.hidden_size) == (3, 6, 64)
    assert count_weight_bytes(load_teacher_config(folder)) == 4
    bfloat16 = fakes.write_teacher(tmp_path / "bfloat16", dtype=torch.bfloat16)
    assert count_weight_bytes(load_teacher_config(bfloat16)) == 2


def test_a_name_is_looked_up_on_the_hub(hub: list[dict[str, Any]]) -> None:
    spec = load_teacher_spec(build_recipe("someone/tiny", kept=4))
    assert (spec.num_key_value_layers, spec.shape.num_hidden_layers) == (4, 6)
    assert hub == []  # no weights for a spec
    folder = resolve_teacher(Path("someone/tiny"), revision="abc")
    assert (folder / "model.safetensors").is_file()
    (snapshot,) = hub
    assert (snapshot["name"], snapshot["revision"]) == ("someone/tiny", "abc")
    assert not any(pattern.endswith((".bin", ".pth")) or pattern == "*" for pattern in snapshot["allow_patterns"])


def test_without_the_hub_a_known_teacher_still_has_a_spec(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse(LocalEntryNotFoundError))
    with caplog.at_level(logging.WARNING):
        spec = load_teacher_spec(build_recipe("Qwen/Qwen2.5-7B-Instruct", kept=21))
    assert round(spec.count_trained_parameters() / 1e6) == 116
    assert "table of known teachers" in caplog.text
    with pytest.raises(CheckpointError, match="Check the network"):
        load_teacher_spec(build_recipe("someone/unknown"))


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (GatedRepoError, "log in with `hf auth login`"),
        (RepositoryNotFoundError, "no model of this name.*`hf auth login`"),
        (LocalEntryNotFoundError, "no such folder, and the hub gave nothing"),
        (OSError, "no connection"),
    ],
)
def test_what_the_hub_refuses_is_said_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], advice: str
) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse(error))
    with pytest.raises(CheckpointError, match=f"someone/model.*{advice}"):
        resolve_teacher(Path("someone/model"))


@pytest.mark.parametrize("path", ["/models/teacher", "./teachers/../a", "runs/one/final", ".swiftkv/teacher"])
def test_a_path_that_is_no_name_never_asks_the_hub(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_teacher(Path(path))


def test_a_family_without_a_student_is_refused_before_its_weights_are_downloaded(
    hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "num_hidden_layers": 4}))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(tmp_path / "config.json"))
    for look in (lambda: resolve_teacher(Path("someone/gemma")), lambda: load_teacher_spec(build_recipe("a/gemma"))):
        with pytest.raises(CheckpointError, match="gemma3.*llama, mistral"):
            look()
    assert hub == []


@pytest.mark.usefixtures("hub")
def test_a_cut_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_key_value_layers is 7"):
        load_teacher_spec(build_recipe("someone/tiny", kept=7))
