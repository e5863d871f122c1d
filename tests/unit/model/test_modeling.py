"""The Hugging Face model against the independent reference, and what training may touch."""

import random
from pathlib import Path

import pytest
import torch
from fakes import LLAMA3_ROPE_SCALING, TinyShape, random_prompt_ids, write_student, write_teacher
from reference import compute_hidden_states, compute_logits, generate_greedy, load_weights

from swiftkv.distill.loop import uses_bfloat16
from swiftkv.distill.step import Batch, DistillStep
from swiftkv.errors import CheckpointError, ConfigError
from swiftkv.model.checkpoint import load_student, save_student
from swiftkv.model.convert import convert_teacher, freeze_teacher, initialise_student, resolve_cut

TOLERANCE = 1e-4

CHECKPOINTS = {
    "groups of 1": {"num_key_value_layers": 3},
    "groups of 2": {"num_key_value_layers": 2, "key_value_group_size": 2},
    "groups of 4": {"num_key_value_layers": 2, "key_value_group_size": 4},
    "one later layer": {"num_key_value_layers": 5},
    "tied": {"tied": True},
    "biases": {"attention_bias": True, "key_value_group_size": 3},
    "llama3 rope": {"rope_scaling": LLAMA3_ROPE_SCALING},
    "llama3 rope, new keys": {"rope_scaling": LLAMA3_ROPE_SCALING, "new_rope_keys": True},
    "three shards": {"num_shards": 3},
    "mistral": {"family": "mistral", "key_value_group_size": 3},
    "mistral, window": {"family": "mistral", "sliding_window": 8},
    "qwen2": {"family": "qwen2", "num_key_value_layers": 2, "key_value_group_size": 2},
    "qwen3": {"family": "qwen3", "num_key_value_layers": 2, "key_value_group_size": 2},
    "qwen3, biases": {"family": "qwen3", "attention_bias": True, "tied": True},
    "qwen3_moe": {"family": "qwen3_moe", "num_key_value_layers": 2, "key_value_group_size": 4},
}


@pytest.fixture(params=CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_student(tmp_path / "student", **request.param)


@pytest.mark.parametrize("mode", ["student", "teacher"])
def test_logits_equal_the_reference(folder: Path, mode: str) -> None:
    config, weights = load_weights(folder)
    ids = random_prompt_ids(random.Random(1), 70)
    expected = compute_logits(config, weights, ids, mode=mode)
    with torch.no_grad():
        logits = load_student(folder)(torch.tensor([ids, ids]), teacher=mode == "teacher").logits
    torch.testing.assert_close(logits[0], expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(logits[1], expected, atol=TOLERANCE, rtol=0)


def test_penultimate_state_is_the_output_of_the_second_to_last_layer(folder: Path) -> None:
    config, weights = load_weights(folder)
    ids = random_prompt_ids(random.Random(2), 20)
    expected = compute_hidden_states(config, weights, ids)[-2]
    model = load_student(folder).model
    with torch.no_grad():
        states = model.run_student_half(model.compute_boundary(torch.tensor([ids])))
    torch.testing.assert_close(states.penultimate_BTD[0], expected, atol=TOLERANCE, rtol=0)


def test_generation_with_a_cache_gives_the_reference_tokens(folder: Path) -> None:
    config, weights = load_weights(folder)
    ids = random_prompt_ids(random.Random(3), 30)
    output = load_student(folder).generate(
        torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert output[0, len(ids) :].tolist() == generate_greedy(config, weights, ids, 12)


def test_a_padded_batch_gives_the_same_logits_as_its_rows_alone(tmp_path: Path) -> None:
    model = load_student(write_student(tmp_path))
    short, long = (random_prompt_ids(random.Random(seed), length) for seed, length in ((4, 9), (5, 16)))
    padding = len(long) - len(short)
    mask = torch.tensor([[0] * padding + [1] * len(short), [1] * len(long)])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        batch = model(torch.tensor([[0] * padding + short, long]), attention_mask=mask, position_ids=positions).logits
        alone = model(torch.tensor([short])).logits
    torch.testing.assert_close(batch[0, padding:], alone[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_initialisation_copies_queries_and_norm_and_averages_keys_and_values(tmp_path: Path, group: int) -> None:
    teacher = write_teacher(tmp_path / "teacher", attention_bias=True)
    _, weights = load_weights(teacher)
    state = convert_teacher(teacher, 2, group).state_dict()
    first = "model.layers.2."
    assert torch.equal(state["model.norm_swiftkv.weight"], weights[first + "input_layernorm.weight"])
    for layer in range(2, 6):
        attention = f"model.layers.{layer}.self_attn."
        for kind in ("weight", "bias"):
            assert torch.equal(state[f"{attention}q_proj_swiftkv.{kind}"], weights[f"{attention}q_proj.{kind}"])
            for name in ("k_proj", "v_proj"):
                if (layer - 2) % group:
                    assert f"{attention}{name}_swiftkv.{kind}" not in state
                    continue
                mean = sum(weights[f"model.layers.{layer + i}.self_attn.{name}.{kind}"] for i in range(group)) / group
                torch.testing.assert_close(state[f"{attention}{name}_swiftkv.{kind}"], mean)


@pytest.mark.parametrize("variant", [name for name in CHECKPOINTS if not name.startswith(("groups", "one"))])
def test_the_teacher_inside_the_student_is_the_teacher(tmp_path: Path, variant: str) -> None:
    options = {
        key: value for key, value in CHECKPOINTS[variant].items() if not key.startswith(("num_key", "key_value"))
    }
    teacher = write_teacher(tmp_path / "teacher", **options)
    config, weights = load_weights(teacher)
    ids = random_prompt_ids(random.Random(6), 25)
    with torch.no_grad():
        logits = convert_teacher(teacher, 3)(torch.tensor([ids]), teacher=True).logits[0]
    torch.testing.assert_close(logits, compute_logits(config, weights, ids, mode="teacher"), atol=TOLERANCE, rtol=0)


def test_only_the_student_is_trained(tmp_path: Path) -> None:
    model = convert_teacher(write_teacher(tmp_path), 2, 2)
    trained = freeze_teacher(model)
    assert sum(parameter.numel() for parameter in trained) == model.model.spec.count_trained_parameters()
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if "swiftkv" in name}


def test_a_checkpoint_goes_out_and_comes_back(folder: Path, tmp_path: Path) -> None:
    model = load_student(folder)
    save_student(model, tmp_path / "copy", teacher_folder=folder)
    again = load_student(tmp_path / "copy")
    assert again.config.to_dict() == model.config.to_dict() | {"_name_or_path": again.config._name_or_path}
    assert model.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    config, weights = load_weights(tmp_path / "copy")
    ids = random_prompt_ids(random.Random(7), 12)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits, compute_logits(config, weights, ids), atol=TOLERANCE, rtol=0)
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_saved_config_has_the_rope_keys_of_older_transformers(tmp_path: Path) -> None:
    import json

    folder = write_student(tmp_path / "in", rope_scaling=LLAMA3_ROPE_SCALING, new_rope_keys=True)
    save_student(load_student(folder), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == TinyShape().rope_theta
    assert config["rope_scaling"] == LLAMA3_ROPE_SCALING
    assert config["architectures"] == ["LlamaSwiftKVForCausalLM"] and config["swiftkv"] is True


def test_a_checkpoint_stripped_of_its_teacher_is_the_same_student_and_says_it_has_no_teacher(tmp_path: Path) -> None:
    ids = torch.tensor([random_prompt_ids(random.Random(8), 12)])
    whole = load_student(write_student(tmp_path / "whole"))
    stripped = load_student(write_student(tmp_path / "stripped", keep_teacher_projections=False))
    with torch.no_grad():
        assert torch.equal(whole(ids).logits, stripped(ids).logits)
        with pytest.raises(CheckpointError, match="has no teacher"):
            stripped(ids, teacher=True)


def test_initialising_again_undoes_training(tmp_path: Path) -> None:
    model = convert_teacher(write_teacher(tmp_path), 2, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in freeze_teacher(model):
            parameter.add_(1)
    initialise_student(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_bad_teachers_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        convert_teacher(tmp_path / "missing", 3)
    foreign = write_teacher(tmp_path / "gpt", config_changes={"model_type": "gpt2"})
    with pytest.raises(
        CheckpointError, match=r"'gpt2'; families with a SwiftKV form are: llama, mistral, qwen2, qwen3, qwen3_moe"
    ):
        convert_teacher(foreign, 3)
    pickled = write_teacher(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model.bin\)"):
        convert_teacher(pickled, 3)
    with pytest.raises(CheckpointError, match="tensors of another shape: lm_head.weight"):
        convert_teacher(write_teacher(tmp_path / "shape", config_changes={"vocab_size": 400}), 3)
    with pytest.raises(CheckpointError, match="tensors missing: model.layers.6"):
        convert_teacher(write_teacher(tmp_path / "short", config_changes={"num_hidden_layers": 7}), 3)


def test_a_window_on_some_layers_only_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    mixed = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4}
    teacher = write_teacher(tmp_path, family="qwen2", config_changes=mixed)
    with pytest.raises(CheckpointError, match="Only some layers of this qwen2 model have a sliding window"):
        resolve_cut(teacher, 3)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "qwen3_moe"])
def test_an_untrained_student_of_one_layer_copies_the_teachers_projections(tmp_path: Path, family: str) -> None:
    """Only the last layer is later, and what it reads is what the teacher's reads: the same logits."""
    teacher = write_teacher(tmp_path, family=family)
    config, weights = load_weights(teacher)
    ids = random_prompt_ids(random.Random(10), 25)
    with torch.no_grad():
        logits = convert_teacher(teacher, 5)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits, compute_logits(config, weights, ids, mode="teacher"), atol=TOLERANCE, rtol=0)


def test_cuts_that_do_not_fit_the_teacher_are_refused(tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path)
    with pytest.raises(ConfigError, match="num_key_value_layers is 9, but the model has 6 layers"):
        convert_teacher(teacher, 9)
    with pytest.raises(ConfigError, match=r"does not divide the 3 later layers .* choose one of \[1, 3\]"):
        convert_teacher(teacher, 3, 2)


def test_a_student_that_is_not_swiftkv_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model_type is 'llama', which is not a SwiftKV checkpoint"):
        load_student(write_teacher(tmp_path))


def test_a_bfloat16_teacher_stays_bfloat16_while_its_student_is_trained_in_float32(tmp_path: Path) -> None:
    model = convert_teacher(write_teacher(tmp_path / "teacher", dtype=torch.bfloat16), 3)
    trained = {id(parameter) for parameter in freeze_teacher(model)}
    for parameter in model.parameters():
        assert parameter.dtype == (torch.float32 if id(parameter) in trained else torch.bfloat16)
    step = DistillStep(model, 2.0, 1.0)
    assert uses_bfloat16("auto", step) and uses_bfloat16("float32", step)
    ids = torch.tensor([random_prompt_ids(random.Random(9), 16)])
    with torch.autocast("cpu", torch.bfloat16):
        step(Batch(ids), num_positions=16)["loss"].backward()
    save_student(model, tmp_path / "student", tmp_path / "teacher")
    _, weights = load_weights(tmp_path / "student")
    assert {parameter.dtype for parameter in load_student(tmp_path / "student").parameters()} == {torch.bfloat16}
    assert "model.norm_swiftkv.weight" in weights


def test_quantised_teachers_and_teachers_with_code_are_refused(tmp_path: Path) -> None:
    quantised = write_teacher(tmp_path / "int8", config_changes={"quantization_config": {"quant_method": "x"}})
    with pytest.raises(CheckpointError, match="the teacher is quantised"):
        convert_teacher(quantised, 3)
    with pytest.raises(CheckpointError, match="auto_map"):
        convert_teacher(write_teacher(tmp_path / "code", config_changes={"auto_map": {"AutoModel": "x.Y"}}), 3)
    damaged = write_teacher(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"no safetensors at all")
    with pytest.raises(CheckpointError, match="the weights cannot be read"):
        convert_teacher(damaged, 3)


def test_what_the_model_cannot_do_is_refused(tmp_path: Path) -> None:
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(TypeError, match="does not take labels"):
        load_student(write_student(tmp_path))(ids, labels=[1])
