"""The independent reference against transformers' own models, and against what SwiftKV's definition implies.

Also checks that the random checkpoints of `fakes` are fit for comparing implementations: every other test
leans on both.
"""

import json
import random
from pathlib import Path

import pytest
import reference
import torch
from fakes import END_ID, FAMILIES, LLAMA3_ROPE_SCALING, TinyShape, random_prompt_ids, write_student, write_teacher
from reference import (
    Config,
    Weights,
    compute_hidden_states,
    compute_log_probs,
    compute_logits,
    compute_top2_gap,
    generate_greedy,
    load_weights,
    turn_near_ties,
)
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

EIGHT_LAYERS = TinyShape(num_hidden_layers=8)

ALTERNATING = {
    "use_sliding_window": True,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"] * 2,
}
"""Of the eight layers, the first and the last slide, and a group of two holds both kinds."""

VARIANTS = [
    pytest.param({}, id="llama"),
    pytest.param({"attention_bias": True}, id="llama-bias"),
    pytest.param({"family": "mistral"}, id="mistral"),
    pytest.param({"family": "mistral", "sliding_window": 16}, id="mistral-sliding"),
    pytest.param({"family": "qwen2"}, id="qwen2"),
    pytest.param({"family": "qwen2", "config_changes": ALTERNATING}, id="qwen2-sliding"),
    pytest.param({"family": "qwen3"}, id="qwen3"),
    pytest.param({"family": "qwen3", "attention_bias": True}, id="qwen3-bias"),
    pytest.param({"family": "qwen3_moe"}, id="qwen3_moe"),
]
"""Options of `write_student` for every family, for models of eight layers."""


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"tied": True}, id="tied"),
        pytest.param({"attention_bias": True}, id="bias"),
        pytest.param({"rope_scaling": LLAMA3_ROPE_SCALING}, id="llama3-rope"),
        pytest.param({"rope_scaling": LLAMA3_ROPE_SCALING, "new_rope_keys": True}, id="llama3-rope-new-keys"),
        pytest.param({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, id="linear-rope"),
        pytest.param({"num_shards": 3}, id="sharded"),
        pytest.param({"shape": TinyShape(rope_theta=500000.0), "new_rope_keys": True}, id="theta-new-keys"),
        pytest.param({"shape": TinyShape(num_key_value_heads=4)}, id="mha"),
        pytest.param({"shape": TinyShape(num_key_value_heads=1)}, id="mqa"),
        pytest.param({"shape": TinyShape(head_dim=16), "config_changes": {"head_dim": None}}, id="no-head-dim-key"),
        pytest.param({"family": "mistral", "sliding_window": 16}, id="mistral-sliding"),
        pytest.param({"family": "mistral", "sliding_window": 1}, id="mistral-sees-itself"),
        pytest.param({"family": "mistral"}, id="mistral"),
        pytest.param({"family": "qwen2"}, id="qwen2"),
        pytest.param({"family": "qwen2", "tied": True}, id="qwen2-tied"),
        pytest.param(
            {"family": "qwen2", "config_changes": {"use_sliding_window": True, "max_window_layers": 4}},
            id="qwen2-sliding",
        ),
        pytest.param({"family": "qwen2", "shape": EIGHT_LAYERS, "config_changes": ALTERNATING}, id="qwen2-layer-types"),
        pytest.param({"family": "qwen3"}, id="qwen3"),
        pytest.param({"family": "qwen3", "attention_bias": True, "tied": True}, id="qwen3-bias-tied"),
        pytest.param({"family": "qwen3", "shape": EIGHT_LAYERS, "config_changes": ALTERNATING}, id="qwen3-layer-types"),
        pytest.param({"family": "qwen3_moe"}, id="qwen3_moe"),
        pytest.param({"family": "qwen3_moe", "attention_bias": True}, id="qwen3_moe-bias"),
        pytest.param({"family": "qwen3_moe", "config_changes": {"norm_topk_prob": False}}, id="qwen3_moe-unnormalised"),
        pytest.param({"family": "qwen3_moe", "shape": TinyShape(mlp_only_layers=(1, 4))}, id="qwen3_moe-some-dense"),
        pytest.param(
            {"family": "qwen3_moe", "shape": TinyShape(num_experts=16, num_experts_per_tok=3)}, id="qwen3_moe-3-of-16"
        ),
        pytest.param(
            {"family": "qwen3_moe", "config_changes": {"use_sliding_window": True, "sliding_window": 16}},
            id="qwen3_moe-sliding",
        ),
    ],
)
def test_teacher_logits_are_those_of_transformers(tmp_path: Path, options: dict) -> None:
    write_teacher(tmp_path, seed=5, **options)
    prompt = random_prompt_ids(random.Random(0), 200)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0]
    config, weights = load_weights(tmp_path)
    torch.testing.assert_close(compute_logits(config, weights, prompt, "teacher"), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", VARIANTS)
def test_student_of_one_later_layer_with_copied_projections_is_the_teacher(tmp_path: Path, options: dict) -> None:
    """The hidden state that enters the last layer is what the teacher's last layer reads."""
    last = EIGHT_LAYERS.num_hidden_layers - 1
    write_student(tmp_path, EIGHT_LAYERS, last, **options)
    config, weights = load_weights(tmp_path)
    _copy_last_layer_into_student(weights, last, leader=last)
    _assert_student_is_teacher(config, weights)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize(("kept", "group"), [(4, 1), (4, 2), (4, 4), (2, 3), (1, 7)])
def test_student_is_the_teacher_when_only_its_last_layer_does_anything(
    tmp_path: Path, kept: int, group: int, options: dict
) -> None:
    """With later layers that add nothing, the boundary state reaches the last layer unchanged, so its K and V
    may come from there: by its own projections, held by its group's leader."""
    last = EIGHT_LAYERS.num_hidden_layers - 1
    write_student(tmp_path, EIGHT_LAYERS, kept, group, **options)
    config, weights = load_weights(tmp_path)
    for layer in range(kept, last):
        for name in [name for name in weights if f"layers.{layer}." in name]:
            if "o_proj" in name or "down_proj" in name:
                weights[name].zero_()
    _copy_last_layer_into_student(weights, last, leader=kept + (last - kept) // group * group)
    _assert_student_is_teacher(config, weights)


def _copy_last_layer_into_student(weights: Weights, last: int, leader: int) -> None:
    weights["model.norm_swiftkv.weight"] = weights[f"model.layers.{last}.input_layernorm.weight"]
    for name in [name for name in weights if f"layers.{last}.self_attn" in name and "swiftkv" not in name]:
        kind = name.split(".")[-2]  # q_proj, k_proj, v_proj, o_proj, q_norm or k_norm
        holder = last if kind == "q_proj" else leader
        if kind == "k_norm":
            weights[name.replace(f"layers.{last}.", f"layers.{leader}.")] = weights[name]
        student_name = name.replace(f"layers.{last}.", f"layers.{holder}.").replace(kind, f"{kind}_swiftkv")
        if student_name in weights:
            weights[student_name] = weights[name]


def _assert_student_is_teacher(config: Config, weights: Weights) -> None:
    prompt = random_prompt_ids(random.Random(0), 100)
    student = compute_logits(config, weights, prompt, "student")
    teacher = compute_logits(config, weights, prompt, "teacher")
    torch.testing.assert_close(student, teacher, atol=0, rtol=0)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("group", [1, 2, 4])
def test_every_student_tensor_changes_the_logits(tmp_path: Path, group: int, options: dict) -> None:
    """A tensor without influence would be one that the reference forgot to read.

    Norms of K heads that are not the first of their group are the one thing without.
    """
    write_student(tmp_path, EIGHT_LAYERS, 4, group, keep_teacher_projections=False, **options)
    config, weights = load_weights(tmp_path)
    prompt = random_prompt_ids(random.Random(0), 30)
    logits = compute_logits(config, weights, prompt)
    unread = {f"model.layers.{layer}.self_attn.k_norm.weight" for layer in range(4, 8) if (layer - 4) % group}
    for name in unread & weights.keys():
        weights[name].fill_(float("nan"))
    torch.testing.assert_close(compute_logits(config, weights, prompt), logits, atol=0, rtol=0)
    for name, tensor in weights.items():
        if name in unread:
            continue
        changed = compute_logits(config, weights | {name: tensor + torch.randn_like(tensor)}, prompt)
        # A bias of K moves all scores of a query alike before RoPE, so little is left of it: hence 1e-3.
        assert (changed - logits).abs().max() > 1e-3, name


@pytest.mark.parametrize("family", FAMILIES)
def test_student_reads_nothing_of_the_replaced_projections(tmp_path: Path, family: str) -> None:
    write_student(tmp_path / "kept", EIGHT_LAYERS, 4, 2, family=family)
    write_student(tmp_path / "stripped", EIGHT_LAYERS, 4, 2, family=family, keep_teacher_projections=False)
    prompt = random_prompt_ids(random.Random(0), 30)
    kept, stripped = (compute_logits(*load_weights(tmp_path / name), prompt) for name in ("kept", "stripped"))
    torch.testing.assert_close(kept, stripped, atol=0, rtol=0)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("mode", ["student", "teacher"])
def test_tokens_never_see_later_ones(tmp_path: Path, mode: str, options: dict) -> None:
    write_student(tmp_path, EIGHT_LAYERS, 4, 2, **options)
    config, weights = load_weights(tmp_path)
    prompt = random_prompt_ids(random.Random(0), 40)
    changed = [*prompt[:20], *random_prompt_ids(random.Random(1), 20)]
    before, after = (compute_logits(config, weights, ids, mode) for ids in (prompt, changed))
    torch.testing.assert_close(before[:20], after[:20], atol=1e-5, rtol=0)
    assert (before[20:] - after[20:]).abs().max() > 0.1


@pytest.mark.parametrize(("mode", "hops"), [("teacher", 8), ("student", 5)])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_a_token_reaches_as_far_as_windows_carry_it(tmp_path: Path, mode: str, hops: int, window: int) -> None:
    """One window less one per layer, but a student's later layers (here four of eight) all look from the boundary
    state at once."""
    write_student(tmp_path, EIGHT_LAYERS, 4, 2, family="mistral", sliding_window=window)
    config, weights = load_weights(tmp_path)
    prompt = random_prompt_ids(random.Random(0), 40)
    changed = [(prompt[0] + 1) % 256, *prompt[1:]]
    before, after = (compute_logits(config, weights, ids, mode) for ids in (prompt, changed))
    reach = hops * (window - 1)
    differs = (before - after).abs().amax(dim=-1) > 1e-6
    assert differs[: reach + 1].all()
    assert not differs[reach + 1 :].any()


def test_a_later_layer_looks_as_far_as_its_own_type_says(tmp_path: Path) -> None:
    """Layers 4 and 5 share keys: when one of the two slides, it alone sees less."""
    write_student(tmp_path, EIGHT_LAYERS, 4, 2, family="qwen2")
    config, weights = load_weights(tmp_path)
    prompt = random_prompt_ids(random.Random(0), 40)
    full = compute_hidden_states(config, weights, prompt)
    for sliding in (4, 5):
        types = ["sliding_attention" if layer == sliding else "full_attention" for layer in range(8)]
        changed = config | {"use_sliding_window": True, "sliding_window": 1, "layer_types": types}
        states = compute_hidden_states(changed, weights, prompt)
        first_other = next(index for index in range(9) if not torch.equal(states[index], full[index]))
        assert first_other == sliding + 1  # the state that leaves the layer; a first token sees no less than itself
        torch.testing.assert_close(states[first_other][0], full[first_other][0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("mode", ["student", "teacher"])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("length", [1, 50])
def test_generation_with_a_cache_is_generation_without(
    tmp_path: Path, mode: str, group: int, length: int, options: dict
) -> None:
    write_student(tmp_path, EIGHT_LAYERS, 4, group, rope_scaling=LLAMA3_ROPE_SCALING, **options)
    config, weights = load_weights(tmp_path)
    prompt = random_prompt_ids(random.Random(0), length)
    expected: list[int] = []
    for _ in range(24):
        logits = compute_logits(config, weights, prompt + expected, mode)
        expected.append(int(logits[-1].argmax()))
    assert generate_greedy(config, weights, prompt, 24, mode) == expected


@pytest.mark.parametrize("options", VARIANTS)
def test_nothing_that_later_layers_make_of_a_token_reaches_the_next_ones(tmp_path: Path, options: dict) -> None:
    """What a server relies on when it skips: the prompt may run through later layers of nonsense, or none."""
    write_student(tmp_path, EIGHT_LAYERS, 4, 2, **options)
    config, weights = load_weights(tmp_path)
    nonsense = {name: tensor + 1 if _is_skipped(name) else tensor for name, tensor in weights.items()}
    prompt = random_prompt_ids(random.Random(0), 30)
    cache: reference.Cache = {}
    reference._forward(config, nonsense, prompt[:-1], "student", cache)
    last = reference._forward(config, weights, prompt[-1:], "student", cache)[-1]
    torch.testing.assert_close(last, compute_logits(config, weights, prompt)[-1], atol=1e-4, rtol=0)


def _is_skipped(name: str) -> bool:
    """Whether a prompt token that is not sampled from does without this tensor (4 KV layers of 8)."""
    later = any(f"layers.{layer}." in name for layer in range(4, 8))
    key_value = any(kind in name for kind in ("k_proj_swiftkv", "v_proj_swiftkv", "k_norm"))
    return (later and not key_value) or name in ("model.norm.weight", "lm_head.weight")


def test_top2_gap_is_the_gap_in_full_logits(tmp_path: Path) -> None:
    write_student(tmp_path, EIGHT_LAYERS, 4, 2)
    config, weights = load_weights(tmp_path)
    prompt = random_prompt_ids(random.Random(0), 10)
    generated = generate_greedy(config, weights, prompt, 5)
    gaps = compute_top2_gap(config, weights, prompt, generated)
    assert len(gaps) == 5
    for index, gap in enumerate(gaps):
        logits = compute_logits(config, weights, prompt + generated[:index])[-1]
        best = int(logits.argmax())
        assert best == generated[index]
        rest = torch.cat([logits[:best], logits[best + 1 :]])
        assert gap == pytest.approx(float(logits[best] - rest.max()), abs=1e-4)
        assert gap > 0


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("mode", ["student", "teacher"])
def test_log_probs_are_those_of_each_next_token(tmp_path: Path, mode: str, options: dict) -> None:
    write_student(tmp_path, EIGHT_LAYERS, 4, 2, **options)
    config, weights = load_weights(tmp_path)
    prompt, answer = random_prompt_ids(random.Random(0), 20), random_prompt_ids(random.Random(1), 4)
    log_probs = compute_log_probs(config, weights, prompt, answer, mode)
    assert log_probs.shape == (4, EIGHT_LAYERS.vocab_size)
    torch.testing.assert_close(log_probs.exp().sum(dim=-1), torch.ones(4))
    for index, row in enumerate(log_probs):
        logits = compute_logits(config, weights, prompt + answer[:index], mode)[-1]
        torch.testing.assert_close(row - row[answer[index]], logits - logits[answer[index]], atol=1e-4, rtol=0)


def test_model_type_beyond_the_reference_is_refused(tmp_path: Path) -> None:
    config, weights = load_weights(write_teacher(tmp_path, config_changes={"model_type": "gemma"}))
    with pytest.raises(AssertionError, match="'gemma' is not in the reference"):
        compute_logits(config, weights, [1, 2, 3], "teacher")


def test_student_mode_of_a_teacher_is_refused(tmp_path: Path) -> None:
    config, weights = load_weights(write_teacher(tmp_path))
    with pytest.raises(AssertionError, match="not a SwiftKV checkpoint"):
        compute_logits(config, weights, [1, 2, 3])


# What the random checkpoints promise to the tests that use them.


@pytest.mark.parametrize("options", [*VARIANTS, pytest.param({"tied": True}, id="llama-tied")])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_student_and_teacher_say_different_and_varied_things(tmp_path: Path, seed: int, options: dict) -> None:
    write_student(tmp_path, EIGHT_LAYERS, 4, 2, seed=seed, **options)
    config, weights = load_weights(tmp_path)
    prompt = random_prompt_ids(random.Random(seed), 80)
    student, teacher = (generate_greedy(config, weights, prompt, 48, mode) for mode in ("student", "teacher"))
    assert min(len(set(student)), len(set(teacher))) >= 8
    assert sum(a == b for a, b in zip(student, teacher, strict=True)) <= 16
    assert END_ID not in student + teacher


@pytest.mark.parametrize("seed", range(4))
def test_ties_between_experts_are_rare_and_can_be_turned(tmp_path: Path, seed: int) -> None:
    """Where the last expert chosen and the first left out are near, another arithmetic may rightly swap them."""
    write_student(tmp_path, seed=seed, family="qwen3_moe")
    config, weights = load_weights(tmp_path)
    tokens = random_prompt_ids(random.Random(seed), 600)
    assert len(turn_near_ties(config, weights, tokens, 1.0)) == 600 * 6
    assert len(turn_near_ties(config, weights, tokens, 5e-6)) < 8
    turned = turn_near_ties(config, weights, tokens, 1e-3)[0]
    states, others = (compute_hidden_states(c, weights, tokens) for c in (config, turned))
    name, token = turned["turned"]
    layer = int(name.split(".")[2])
    moved = torch.stack([(a != b).any(dim=-1) for a, b in zip(states, others, strict=True)])  # [L + 1, T]
    assert moved[layer + 1].nonzero().tolist() == [[token]]
    assert not moved[: layer + 1].any() and not moved[:, :token].any()


@pytest.mark.parametrize(
    ("family", "class_prefix", "options", "biased"),
    [
        ("llama", "Llama", {}, ""),
        ("llama", "Llama", {"attention_bias": True}, "qkvo"),
        ("mistral", "Mistral", {"sliding_window": 16}, ""),
        ("qwen2", "Qwen2", {}, "qkv"),
        ("qwen3", "Qwen3", {}, ""),
        ("qwen3", "Qwen3", {"attention_bias": True}, "qkvo"),
        ("qwen3_moe", "Qwen3Moe", {}, ""),
    ],
)
def test_student_has_the_tensors_of_the_published_format(
    tmp_path: Path, family: str, class_prefix: str, options: dict, biased: str
) -> None:
    tiny = TinyShape(num_hidden_layers=6)
    write_teacher(tmp_path / "teacher", tiny, family=family, **options)
    write_student(tmp_path / "student", tiny, 2, 2, family=family, **options)
    _, teacher = load_weights(tmp_path / "teacher")
    config, student = load_weights(tmp_path / "student")
    attention = "model.layers.{}.self_attn.{}_proj_swiftkv.{}"
    parts = ("weight", "bias") if biased else ("weight",)
    expected = {attention.format(layer, "q", part) for layer in (2, 3, 4, 5) for part in parts}
    expected |= {attention.format(layer, kind, part) for layer in (2, 4) for kind in "kv" for part in parts}
    biases = {f"model.layers.{layer}.self_attn.{kind}_proj.bias" for layer in range(6) for kind in biased}
    assert {name for name in teacher if name.endswith("bias")} == biases
    assert set(student) - set(teacher) == expected | {"model.norm_swiftkv.weight"}
    assert all(torch.equal(student[name], teacher[name]) for name in teacher)
    assert config["architectures"] == [f"{class_prefix}SwiftKVForCausalLM"]
    assert config["model_type"] == f"{family}_swiftkv"
    assert config["swiftkv"] is True
    assert (config["num_key_value_layers"], config["key_value_group_size"]) == (2, 2)


@pytest.mark.parametrize("options", VARIANTS)
def test_stripped_student_lacks_exactly_the_replaced_projections(tmp_path: Path, options: dict) -> None:
    tiny = TinyShape(num_hidden_layers=4)
    write_student(tmp_path / "kept", tiny, 2, **options)
    write_student(tmp_path / "stripped", tiny, 2, keep_teacher_projections=False, **options)
    kept, stripped = (set(load_weights(tmp_path / name)[1]) for name in ("kept", "stripped"))
    has_bias = "model.layers.0.self_attn.q_proj.bias" in kept
    parts = ("weight", "bias") if has_bias else ("weight",)
    replaced = {
        f"model.layers.{layer}.self_attn.{kind}_proj.{part}" for layer in (2, 3) for kind in "qkv" for part in parts
    }
    assert kept - stripped == replaced
    assert stripped <= kept


def test_shards_hold_what_one_file_holds(tmp_path: Path) -> None:
    write_student(tmp_path / "one", seed=2)
    write_student(tmp_path / "three", seed=2, num_shards=3)
    (_, one), (_, three) = load_weights(tmp_path / "one"), load_weights(tmp_path / "three")
    assert one.keys() == three.keys()
    assert all(torch.equal(one[name], three[name]) for name in one)
    index = json.loads((tmp_path / "three" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == one.keys()
    assert len(set(index["weight_map"].values())) == 3


def test_dtype_is_that_of_the_file_and_the_config(tmp_path: Path) -> None:
    write_student(tmp_path, dtype=torch.bfloat16)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}
    config, weights = load_weights(tmp_path)
    assert config["torch_dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_any_text_comes_back_from_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_teacher(tmp_path))
    text = "def naïve(x):\n\treturn '雪'  # <tag>\r\n"
    token_ids = tokenizer.encode(text)
    assert token_ids == list(text.encode("utf-8"))
    assert tokenizer.decode(token_ids) == text
    assert (len(tokenizer), tokenizer.eos_token_id) == (300, END_ID)
    assert tokenizer.decode([299]) == "[299]"


def test_chat_template_names_each_speaker(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_teacher(tmp_path))
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>hi\n<|assistant|>"
