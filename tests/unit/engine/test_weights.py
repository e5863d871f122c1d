"""Which tensors of a checkpoint each role of an engine takes, and under which names. All names are written by hand."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import TinyShape, write_student
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from swiftkv.engine.weights import list_tensor_files, place_tensor, place_tensors, read_prefill_tensors
from swiftkv.spec import ModelShape, SwiftKVSpec

LAYER = "model.layers"
HOLDER = "model.kv_holders"


def build_spec(layers: int, kept: int, group: int) -> SwiftKVSpec:
    return SwiftKVSpec(ModelShape(64, 128, layers, 4, 2, 32, 300), kept, group)


SPEC = build_spec(layers=8, kept=2, group=3)
"""Layers 0 and 1 run for every token; 2, 3 and 4 read the KV of holder 2, and 5, 6 and 7 that of holder 5."""

NAMES: dict[str, tuple[str, list[str], list[str]]] = {
    # case: (name in the checkpoint, names in the full engine, names in the prefill half)
    "embeddings": ("model.embed_tokens.weight", ["model.embed_tokens.weight"], ["model.embed_tokens.weight"]),
    "norm at the cut": ("model.norm_swiftkv.weight", ["model.norm_swiftkv.weight"], ["model.norm_swiftkv.weight"]),
    "final norm": ("model.norm.weight", ["model.norm.weight"], []),
    "LM head": ("lm_head.weight", ["lm_head.weight"], []),
    "quantised LM head": ("lm_head.weight_scale", ["lm_head.weight_scale"], []),
    "first layer's Q": (f"{LAYER}.0.self_attn.q_proj.weight",) + 2 * ([f"{LAYER}.0.self_attn.q_proj.weight"],),
    "first layer's K": (f"{LAYER}.1.self_attn.k_proj.weight",) + 2 * ([f"{LAYER}.1.self_attn.k_proj.weight"],),
    "first layer's bias": (f"{LAYER}.1.self_attn.v_proj.bias",) + 2 * ([f"{LAYER}.1.self_attn.v_proj.bias"],),
    "first layer's k_norm": (f"{LAYER}.0.self_attn.k_norm.weight",) + 2 * ([f"{LAYER}.0.self_attn.k_norm.weight"],),
    "first layer's MLP": (f"{LAYER}.1.mlp.up_proj.weight",) + 2 * ([f"{LAYER}.1.mlp.up_proj.weight"],),
    "first layer's KV scale": (f"{LAYER}.1.self_attn.k_scale",) + 2 * ([f"{LAYER}.1.self_attn.attn.k_scale"],),
    "first layer's quantised K": (
        f"{LAYER}.1.self_attn.k_proj.weight_scale",
        [f"{LAYER}.1.self_attn.k_proj.weight_scale"],
        [f"{LAYER}.1.self_attn.k_proj.weight_scale"],
    ),
    "leader's K": (f"{LAYER}.2.self_attn.k_proj_swiftkv.weight",) + 2 * ([f"{HOLDER}.2.k_proj_swiftkv.weight"],),
    "leader's V bias": (f"{LAYER}.5.self_attn.v_proj_swiftkv.bias",) + 2 * ([f"{HOLDER}.5.v_proj_swiftkv.bias"],),
    "leader's quantised K": (
        f"{LAYER}.5.self_attn.k_proj_swiftkv.weight_scale",
        [f"{HOLDER}.5.k_proj_swiftkv.weight_scale"],
        [f"{HOLDER}.5.k_proj_swiftkv.weight_scale"],
    ),
    "leader's k_norm": (f"{LAYER}.5.self_attn.k_norm.weight",) + 2 * ([f"{HOLDER}.5.k_norm.weight"],),
    "other reader's k_norm": (f"{LAYER}.6.self_attn.k_norm.weight", [], []),
    "other reader's K, of no use": (f"{LAYER}.6.self_attn.k_proj_swiftkv.weight", [], []),
    "leader's KV scale": (
        f"{LAYER}.5.self_attn.v_scale",
        [f"{HOLDER}.5.attn.v_scale", *(f"{LAYER}.{layer}.self_attn.attn.v_scale" for layer in (5, 6, 7))],
        [f"{HOLDER}.5.attn.v_scale"],
    ),
    "other reader's KV scale": (f"{LAYER}.4.self_attn.k_scale", [], []),
    "reader's Q": (f"{LAYER}.4.self_attn.q_proj_swiftkv.weight", [f"{LAYER}.4.self_attn.q_proj_swiftkv.weight"], []),
    "leader's Q": (f"{LAYER}.2.self_attn.q_proj_swiftkv.bias", [f"{LAYER}.2.self_attn.q_proj_swiftkv.bias"], []),
    "reader's q_norm": (f"{LAYER}.2.self_attn.q_norm.weight", [f"{LAYER}.2.self_attn.q_norm.weight"], []),
    "reader's O": (f"{LAYER}.7.self_attn.o_proj.weight", [f"{LAYER}.7.self_attn.o_proj.weight"], []),
    "reader's quantised O": (
        f"{LAYER}.7.self_attn.o_proj.weight_scale",
        [f"{LAYER}.7.self_attn.o_proj.weight_scale"],
        [],
    ),
    "later layer's MLP": (f"{LAYER}.3.mlp.down_proj.weight", [f"{LAYER}.3.mlp.down_proj.weight"], []),
    "later layer's norm": (f"{LAYER}.3.input_layernorm.weight", [f"{LAYER}.3.input_layernorm.weight"], []),
    "later layer's expert": (
        f"{LAYER}.3.mlp.experts.0.up_proj.weight",
        [f"{LAYER}.3.mlp.experts.0.up_proj.weight"],
        [],
    ),
    "teacher's Q": (f"{LAYER}.2.self_attn.q_proj.weight", [], []),
    "teacher's K of a leader": (f"{LAYER}.2.self_attn.k_proj.weight", [], []),
    "teacher's bias": (f"{LAYER}.3.self_attn.v_proj.bias", [], []),
    "teacher's quantised V": (f"{LAYER}.3.self_attn.v_proj.weight_scale", [], []),
}


@pytest.mark.parametrize(("name", "full", "prefill"), NAMES.values(), ids=NAMES)
def test_a_tensor_goes_to_the_parameters_that_use_it(name: str, full: list[str], prefill: list[str]) -> None:
    assert place_tensor(name, SPEC, prefill_only=False) == full
    assert place_tensor(name, SPEC, prefill_only=True) == prefill


def test_a_model_without_later_layers_keeps_every_name() -> None:
    spec = build_spec(layers=4, kept=4, group=1)
    for name in (f"{LAYER}.3.self_attn.k_proj.weight", f"{LAYER}.3.self_attn.k_norm.weight", "lm_head.weight"):
        assert place_tensor(name, spec, prefill_only=False) == [name]


def list_names(spec: SwiftKVSpec, family: str, extras: dict[str, bool]) -> dict[str, tuple[list[str], list[str]]]:
    """Every name of a published checkpoint, with its names in the full engine and in the prefill half.

    `extras`: whether K, Q and V have biases, the teacher's projections are kept, weights and cache are quantised.
    """
    names: dict[str, tuple[list[str], list[str]]] = {}
    suffixes = ["weight"] + ["bias"] * extras["biased"] + ["weight_scale"] * extras["quantised"]

    def add(name: str, full: str | None = None, prefill: str | None = None) -> None:
        names[name] = ([full] if full else [], [prefill] if prefill else [])

    for name in ("model.embed_tokens.weight", "model.norm_swiftkv.weight"):
        add(name, name, name)
    for name in ("model.norm.weight", "lm_head.weight"):
        add(name, name)
    kept, group = spec.num_key_value_layers, spec.key_value_group_size
    for layer in range(spec.shape.num_hidden_layers):
        first, leads = layer < kept, layer >= kept and (layer - kept) % group == 0
        attention = f"{LAYER}.{layer}.self_attn"
        always = [f"{attention}.o_proj.weight"]
        always += [f"{LAYER}.{layer}.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")]
        always += [f"{LAYER}.{layer}.{norm}_layernorm.weight" for norm in ("input", "post_attention")]
        if family == "qwen3":
            always.append(f"{attention}.q_norm.weight")
            name, held = f"{attention}.k_norm.weight", f"{HOLDER}.{layer}.k_norm.weight"
            add(name, *(2 * [name] if first else 2 * [held] if leads else []))
        for name in always:
            add(name, name, name if first else None)
        for kind in "qkv":
            for suffix in suffixes:
                name, own = f"{attention}.{kind}_proj.{suffix}", f"{kind}_proj_swiftkv.{suffix}"
                if first:
                    add(name, name, name)
                elif extras["keeps_teacher"]:
                    add(name)
                if not first and kind == "q":
                    add(f"{attention}.{own}", f"{attention}.{own}")
                elif leads:
                    add(f"{attention}.{own}", *2 * [f"{HOLDER}.{layer}.{own}"])
        for kind in "kv" if extras["quantised"] else "":
            name, scale = f"{attention}.{kind}_scale", f"attn.{kind}_scale"
            if first:
                add(name, *2 * [f"{attention}.{scale}"])
            else:
                holder = [f"{HOLDER}.{layer}.{scale}"] if leads else []
                readers = [f"{LAYER}.{layer + i}.self_attn.{scale}" for i in range(group)] if leads else []
                names[name] = (holder + readers, holder)
    return names


def draw_spec(rng: random.Random) -> SwiftKVSpec:
    layers = rng.randint(1, 40)
    kept = rng.randint(1, layers)
    later = layers - kept
    return build_spec(layers, kept, rng.choice([g for g in range(1, later + 1) if later % g == 0] or [1]))


def test_all_parameters_of_random_models_are_covered_once() -> None:
    rng = random.Random(0)
    for _ in range(200):
        spec, family = draw_spec(rng), rng.choice(("llama", "qwen3"))
        extras = {key: rng.random() < 0.5 for key in ("biased", "keeps_teacher", "quantised")}
        names = list_names(spec, family, extras)
        for role, prefill_only in enumerate((False, True)):
            tensors = [(name, torch.empty(0)) for name in names]
            placed = [name for name, _ in place_tensors(tensors, spec, prefill_only)]
            assert placed == [name for roles in names.values() for name in roles[role]], (spec, family, extras)
            assert len(placed) == len(set(placed))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("keep_teacher", [True, False])
def test_the_names_by_hand_are_those_of_whole_checkpoints(family: str, keep_teacher: bool, tmp_path: Path) -> None:
    """That the list above leaves out no tensor that checkpoints of these families have."""
    folder = write_family(tmp_path, family, keep_teacher_projections=keep_teacher)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        found = set(file.keys())
    extras = {"biased": family == "qwen2", "keeps_teacher": keep_teacher, "quantised": False}
    assert found == set(list_names(build_spec(6, 2, 2), family, extras))


def write_family(folder: Path, family: str, **changes: Any) -> Path:
    return write_student(folder, TinyShape(), 2, 2, family=family, **changes)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_prefill_half_gets_its_tensors_from_all_files(num_shards: int, tmp_path: Path) -> None:
    folder = write_family(tmp_path, "qwen3", num_shards=num_shards)
    names = list_names(build_spec(6, 2, 2), "qwen3", {"biased": False, "keeps_teacher": True, "quantised": False})
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    expected = {placed: stored[name] for name, roles in names.items() for placed in roles[1]}
    found = dict(read_prefill_tensors(folder, build_spec(6, 2, 2)))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_files_that_the_index_does_not_name_are_left_alone(tmp_path: Path) -> None:
    """Mistral publishes the same weights a second time, under names of its own."""
    folder = write_family(tmp_path, "mistral", num_shards=2)
    expected = [name for name, _ in read_prefill_tensors(folder, build_spec(6, 2, 2))]
    save_file({"layers.0.attention.wq.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    assert [name for name, _ in read_prefill_tensors(folder, build_spec(6, 2, 2))] == expected
    assert [file.name for file in list_tensor_files(folder)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_the_spec_counts_what_a_prefill_half_reads(tmp_path: Path, group: int, tied: bool) -> None:
    folder = write_student(tmp_path, TinyShape(num_hidden_layers=8), 4, group, tied=tied, dtype=torch.bfloat16)
    spec = SwiftKVSpec.from_hf_config(json.loads((folder / "config.json").read_text()))
    read = sum(tensor.numel() * tensor.element_size() for _, tensor in read_prefill_tensors(folder, spec))
    assert spec.compute_prefill_weight_bytes() == read
