"""The quality table's teacher: the same weights twice, interrupted or not, and a folder that loads."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from swiftkv.errors import ConfigError, DataError
from swiftkv.spec import SwiftKVSpec

Scripts = dict[str, ModuleType]
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
NUM_STEPS = 4


@pytest.fixture(scope="module")
def trained(scripts: Scripts, corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("teacher")
    summary = scripts["teacher"].train_teacher(corpus_folder, folder, NUM_STEPS, config_changes=TINY)
    return folder, summary


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "teacher" / "model.safetensors")


def test_an_interrupted_training_ends_with_the_same_weights(
    trained: Any, scripts: Scripts, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = scripts["teacher"]
    monkeypatch.setattr(teacher, "STATE_S", 0.0)
    step, num_calls = teacher.train_step, 0

    def train_and_fail(*arguments: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise KeyboardInterrupt
        step(*arguments)

    monkeypatch.setattr(teacher, "train_step", train_and_fail)
    with pytest.raises(KeyboardInterrupt):
        teacher.train_teacher(corpus_folder, tmp_path, NUM_STEPS, config_changes=TINY)
    summary = teacher.train_teacher(corpus_folder, tmp_path, NUM_STEPS, resume=True, config_changes=TINY)
    whole, resumed = load_weights(trained[0]), load_weights(tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert summary.num_steps == NUM_STEPS and num_calls == NUM_STEPS + 1
    assert summary.num_tokens == trained[1].num_tokens == NUM_STEPS * (9 * 256 + 2 * 512 + 1024)


def test_a_state_of_another_length_or_seed_is_not_gone_on_from(
    scripts: Scripts, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = scripts["teacher"]
    monkeypatch.setattr(teacher, "STATE_S", 0.0)
    teacher.train_teacher(corpus_folder, tmp_path, 1, config_changes=TINY)
    for changes in ({"steps": 2}, {"steps": 1, "seed": 1}):
        with pytest.raises(ConfigError, match="of a training with"):
            teacher.train_teacher(corpus_folder, tmp_path, resume=True, config_changes=TINY, **changes)


def test_another_seed_gives_other_weights(trained: Any, scripts: Scripts, corpus_folder: Path, tmp_path: Path) -> None:
    scripts["teacher"].train_teacher(corpus_folder, tmp_path, NUM_STEPS, seed=1, config_changes=TINY)
    name = "model.embed_tokens.weight"
    assert not torch.equal(load_weights(trained[0])[name], load_weights(tmp_path)[name])


def test_training_lowers_the_loss(scripts: Scripts, corpus_folder: Path) -> None:
    teacher = scripts["teacher"]
    tokenizer = teacher.load_tokenizer(corpus_folder)
    torch.manual_seed(0)
    model = teacher.build_model(tokenizer, TINY)
    optimizers, progress = teacher.build_optimizers(model), teacher.Progress()
    batches = next(teacher.iterate_steps(corpus_folder, tokenizer, 0))
    losses = []
    for _ in range(6):
        teacher.train_step(model, optimizers, batches, progress, reached=0.0)
        with torch.no_grad():
            losses.append(float(teacher.compute_losses(model, batches[0])[0].mean()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.05


def test_the_folder_is_an_ordinary_hugging_face_model(trained: Any) -> None:
    folder, summary = trained
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
    assert model.get_input_embeddings().weight is model.lm_head.weight
    assert summary.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert model.config.max_position_embeddings == 1024 and model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")


@pytest.mark.parametrize(("kept", "group"), [(6, 1), (4, 1), (3, 1), (4, 2), (4, 4)])
def test_the_full_size_has_the_cuts_of_the_table(scripts: Scripts, corpus_folder: Path, kept: int, group: int) -> None:
    tokenizer = scripts["teacher"].load_tokenizer(corpus_folder)
    model = scripts["teacher"].build_model(tokenizer, {"vocab_size": 4096})
    assert 6e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 9e6
    cut = {"num_key_value_layers": kept, "key_value_group_size": group}
    assert SwiftKVSpec.from_hf_config(model.config.to_dict() | {"model_type": "llama_swiftkv"} | cut)


def test_rates_rise_stay_and_fall(scripts: Scripts) -> None:
    compute = scripts["teacher"].compute_rate_frac
    assert compute(0, 0.0) == pytest.approx(1 / 30) and compute(29, 0.01) == 1.0
    assert compute(500, 0.3) == 1.0 and compute(500, 0.65) == pytest.approx(0.5) and compute(500, 1.0) == 0.0


def test_muon_makes_updates_orthogonal(scripts: Scripts) -> None:
    torch.manual_seed(0)
    for shape in ((2, 48, 16), (2, 16, 48), (1, 32, 32)):
        matrices = torch.randn(shape) + 3.0
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        result = scripts["muon"].compute_orthogonal(matrices)
        inner = left.mT @ result @ right.mT
        assert (inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3, (
            "the singular vectors stay"
        )
        assert 0.3 < inner.diagonal(dim1=1, dim2=2).min() and inner.diagonal(dim1=1, dim2=2).max() < 1.5


def test_muon_steps_against_the_gradient_by_hand(scripts: Scripts) -> None:
    parameter = torch.nn.Parameter(torch.full((4, 4), 2.0))
    parameter.grad = torch.eye(4)
    optimizer = scripts["muon"].Muon([parameter], lr=0.1, weight_decay=0.5)
    optimizer.step()
    expected = 2.0 * (1 - 0.05) - 0.1 * scripts["muon"].compute_orthogonal(torch.eye(4)[None])[0]
    assert torch.allclose(parameter.detach(), expected, atol=1e-6)


def test_what_cannot_train_is_refused(scripts: Scripts, corpus_folder: Path, tmp_path: Path) -> None:
    train = scripts["teacher"].train_teacher
    with pytest.raises(ConfigError, match="steps: -1"):
        train(corpus_folder, tmp_path, -1)
    with pytest.raises(DataError, match="no tokenizer in it"):
        train(tmp_path, tmp_path / "out", 1)
