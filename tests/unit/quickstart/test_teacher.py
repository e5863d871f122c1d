"""The quickstart's teacher script: the same weights twice, a folder that loads, and settings that are honoured."""

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from swiftkv.errors import ConfigError, DataError

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
NUM_STEPS = 10


@pytest.fixture(scope="module")
def trained(teacher_script: ModuleType, corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("teacher")
    summary = teacher_script.train_teacher(corpus_folder, folder, None, NUM_STEPS, config_changes=TINY)
    return folder, summary


def test_the_same_seed_and_steps_give_the_same_weights(
    trained: Any, teacher_script: ModuleType, corpus_folder: Path, tmp_path: Path
) -> None:
    folder, summary = trained
    teacher_script.train_teacher(corpus_folder, tmp_path / "same", None, NUM_STEPS, config_changes=TINY)
    teacher_script.train_teacher(corpus_folder, tmp_path / "other", None, NUM_STEPS, seed=1, config_changes=TINY)
    first, same, other = (
        load_file(path / "model.safetensors") for path in (folder, tmp_path / "same", tmp_path / "other")
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert summary.num_steps == NUM_STEPS


def test_training_teaches_something(trained: Any) -> None:
    _, summary = trained
    assert set(summary.heldout_perplexity) == {"0-512", "1024-1536"}
    # Uniform guessing has the perplexity of the vocabulary's size.
    assert all(1 < value < 0.9 * 4096 for value in summary.heldout_perplexity.values())
    assert summary.final_loss < math.log(4096)


def test_the_folder_is_an_ordinary_hugging_face_model(trained: Any) -> None:
    folder, summary = trained
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
    assert summary.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert model.config.max_position_embeddings == 2048 and model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "def f(x):"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_the_full_size_is_four_to_eight_million_parameters(teacher_script: ModuleType, corpus_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(corpus_folder / "tokenizer")
    model = teacher_script.build_model(tokenizer, {})
    assert 4e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 8e6
    assert model.config.num_hidden_layers >= 8
    assert model.config.head_dim in (32, 64)


def test_fewer_seconds_than_the_steps_need_shorten_the_training(
    teacher_script: ModuleType, corpus_folder: Path, tmp_path: Path
) -> None:
    summary = teacher_script.train_teacher(corpus_folder, tmp_path, 0.5, 100_000, config_changes=TINY)
    assert 1 <= summary.num_steps < 1000


def test_time_counts_only_where_the_machine_is_too_slow(teacher_script: ModuleType) -> None:
    reach = teacher_script.compute_reached
    assert reach(70, 700, 15.0, 150.0) == 0.1 == reach(70, 700, 1e9, None)
    assert reach(1, 700, 14.9, 150.0) == 1 / 700  # a slow first step
    assert reach(10, 700, 150.0, 150.0) == 1.0 == reach(700, 700, 1.0, 150.0)
    # A slow start is made up for: what was slow once does not shorten what follows.
    assert reach(400, 700, 60.0, 150.0) == 400 / 700


def test_rows_begin_with_the_begin_token_and_hold_every_text_once(teacher_script: ModuleType) -> None:
    files, chats = torch.arange(1000, 1000 + 3 * 2048), torch.full((2048,), 7)
    batches = teacher_script.RowSource(files, chats, 4, 1, seed=0).iterate_batches(256)
    batch = torch.cat([next(batches) for _ in range(8)])
    assert batch.shape == (32, 257) and bool((batch[:, 0] == 1).all())
    is_chat = (batch[:, 1:] == 7).all(dim=1)
    assert is_chat.tolist() == [False, False, False, True] * 8
    assert torch.equal(batch[~is_chat][:, 1:].flatten().sort().values, files)


def test_chats_are_whole_functions_cut_at_a_line_end(teacher_script: ModuleType) -> None:
    text = "def f(x):\n    y = x\n    return y\n"
    (chat,) = teacher_script.build_chats([{"text": text}, {"text": "def g(): pass\n"}], seed=0)
    given, _, rest = chat.removeprefix("<|user|>").partition("<|assistant|>")
    assert given + rest + "\n" == text and rest.startswith("\n")


def test_the_learning_rate_rises_and_falls_to_zero(teacher_script: ModuleType) -> None:
    settings = teacher_script.TrainingSettings()
    rates = [teacher_script.compute_rate_frac(settings, step, step / 400) for step in range(401)]
    assert rates[-1] == 0 and max(rates) == 1
    assert rates[: settings.warmup_steps] == sorted(rates[: settings.warmup_steps]) and rates[0] < 0.1
    assert rates[200:] == sorted(rates[200:], reverse=True) and rates[200] < 1


def test_what_cannot_work_is_refused(teacher_script: ModuleType, corpus_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="steps and seconds are both None"):
        teacher_script.train_teacher(corpus_folder, tmp_path, None, None)
    with pytest.raises(ConfigError, match="steps: 0 given"):
        teacher_script.train_teacher(corpus_folder, tmp_path, None, 0)
    with pytest.raises(DataError, match=r"corpus\.py"):
        teacher_script.train_teacher(tmp_path, tmp_path / "model")
