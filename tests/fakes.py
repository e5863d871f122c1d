"""Tiny random checkpoints in the published format: what tests load instead of real models.

Writes files directly with safetensors and json, not through the package, so that a mistake in the package's
own saving cannot hide. Trains nothing.
Called by: tests. Calls: torch, safetensors, bench/byte_tokenizer.py.
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from swiftkv.bench.byte_tokenizer import SPECIAL_TOKENS, write_tokenizer

Tensors = dict[str, torch.Tensor]

BEGIN_ID, END_ID, PAD_ID = 256, 257, 258
"""Ids below 256 are the byte itself."""

LLAMA3_ROPE_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""Scaling whose three regimes (kept, blended, slowed) all occur with a head size of 32 and theta 10,000."""


LOGIT_SPREAD = 1.5
"""Standard deviation of a random model's logits."""


@dataclass(frozen=True)
class TinyShape:
    """Sizes of a random model; the defaults run everywhere, and the head size is one vLLM's CPU kernels take.

    Experts are of families that have them; `mlp_only_layers` of those are dense all the same.
    """

    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    vocab_size: int = 300
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    num_experts: int = 4
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 64
    mlp_only_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Family:
    """What one architecture's checkpoints hold that another's do not."""

    class_prefix: str
    """Of the class names in config.json."""
    biased: str
    """Kinds of attention projections that may have a bias."""
    has_bias_key: bool
    """Whether `attention_bias` in config.json says if they have; without the key they always do."""
    has_head_norms: bool = False
    has_experts: bool = False


FAMILIES = {
    "llama": Family("Llama", biased="qkvo", has_bias_key=True),
    "mistral": Family("Mistral", biased="", has_bias_key=False),
    "qwen2": Family("Qwen2", biased="qkv", has_bias_key=False),
    "qwen3": Family("Qwen3", biased="qkvo", has_bias_key=True, has_head_norms=True),
    "qwen3_moe": Family("Qwen3Moe", biased="qkvo", has_bias_key=True, has_head_norms=True, has_experts=True),
}
"""By the teacher's model type; the student's is that with `_swiftkv`."""


def write_teacher(
    folder: Path | str,
    shape: TinyShape = TinyShape(),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    attention_bias: bool = False,
    rope_scaling: dict[str, Any] | None = None,
    new_rope_keys: bool = False,
    num_shards: int = 1,
    config_changes: dict[str, Any] | None = None,
    family: str = "llama",
    sliding_window: int | None = None,
) -> Path:
    """A random teacher as an ordinary Hugging Face folder with a tokenizer; returns the folder.

    `family` is its model type, one of FAMILIES. `attention_bias` and `sliding_window` (tokens that a query
    attends to; None: all) are for families whose config.json has the key: the latter is Mistral's alone.
    `new_rope_keys` writes transformers 5's `rope_parameters` instead of `rope_theta` and `rope_scaling`.
    `config_changes` overrides keys of config.json (None removes a key) without changing the tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = _build_teacher_tensors(shape, generator, tied, attention_bias, family)
    config = _build_config(shape, dtype, tied, attention_bias, rope_scaling, new_rope_keys, family, sliding_window)
    return _write_folder(Path(folder), config, tensors, dtype, num_shards, config_changes)


def write_student(
    folder: Path | str,
    shape: TinyShape = TinyShape(),
    num_key_value_layers: int = 3,
    key_value_group_size: int = 1,
    seed: int = 0,
    keep_teacher_projections: bool = True,
    tied: bool = False,
    attention_bias: bool = False,
    dtype: torch.dtype = torch.float32,
    rope_scaling: dict[str, Any] | None = None,
    new_rope_keys: bool = False,
    num_shards: int = 1,
    config_changes: dict[str, Any] | None = None,
    family: str = "llama",
    sliding_window: int | None = None,
) -> Path:
    """A random SwiftKV checkpoint of a family (the teacher's model type, one of FAMILIES); returns the folder.

    Its teacher tensors are those that `write_teacher` draws from the same shape and seed; its own projections
    are drawn independently, so that student and teacher answer differently. Published checkpoints keep the
    teacher's Q, K and V of later layers; `keep_teacher_projections=False` writes a stripped one, which keeps
    every norm of Q and K heads.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = _build_teacher_tensors(shape, generator, tied, attention_bias, family)
    later = range(num_key_value_layers, shape.num_hidden_layers)
    leaders = range(num_key_value_layers, shape.num_hidden_layers, key_value_group_size)
    if not keep_teacher_projections:
        tensors = {name: tensor for name, tensor in tensors.items() if not _is_replaced(name, later)}
    for layer in later:
        kinds = "qkv" if layer in leaders else "q"
        tensors |= _draw_projections(shape, generator, layer, kinds, "_swiftkv", _biased(family, attention_bias))
    tensors["model.norm_swiftkv.weight"] = _draw_norm(shape.hidden_size, generator)
    config = _build_config(shape, dtype, tied, attention_bias, rope_scaling, new_rope_keys, family, sliding_window)
    config |= {
        "architectures": [f"{FAMILIES[family].class_prefix}SwiftKVForCausalLM"],
        "model_type": f"{family}_swiftkv",
        "swiftkv": True,
        "num_key_value_layers": num_key_value_layers,
        "key_value_group_size": key_value_group_size,
    }
    return _write_folder(Path(folder), config, tensors, dtype, num_shards, config_changes)


def random_prompt_ids(rng: random.Random, length: int, vocab_size: int = 300) -> list[int]:
    """`length` random token ids, special tokens left out."""
    specials = range(256, 256 + len(SPECIAL_TOKENS))
    allowed = [token for token in range(vocab_size) if token not in specials]
    return rng.choices(allowed, k=length)


def _build_teacher_tensors(
    shape: TinyShape, generator: torch.Generator, tied: bool, attention_bias: bool, family: str
) -> Tensors:
    hidden = shape.hidden_size
    # A tied table of this size would make the current token the likeliest next one, hence the smaller spread.
    embeddings = _draw(shape.vocab_size, hidden, LOGIT_SPREAD if tied else math.sqrt(hidden), generator)
    tensors = {"model.embed_tokens.weight": embeddings}
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        tensors |= _draw_projections(shape, generator, layer, "qkvo", "", _biased(family, attention_bias))
        if FAMILIES[family].has_head_norms:
            # As large as the gain of Q and K elsewhere, since the norm takes that gain away.
            for kind in "qk":
                tensors[f"{prefix}self_attn.{kind}_norm.weight"] = 1.4 * _draw_norm(shape.head_dim, generator)
        if FAMILIES[family].has_experts and layer not in shape.mlp_only_layers:
            tensors |= _draw_experts(shape, generator, f"{prefix}mlp.")
        else:
            tensors |= _draw_mlp(hidden, shape.intermediate_size, generator, f"{prefix}mlp.")
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = _draw_norm(hidden, generator)
    tensors["model.norm.weight"] = _draw_norm(hidden, generator)
    # A zero row gives the end token a logit of 0, which is never the best of hundreds of random ones: a
    # random model does not stop by itself, yet requests may name the token.
    if tied:
        embeddings[END_ID] = 0
    else:
        tensors["lm_head.weight"] = _draw(shape.vocab_size, hidden, LOGIT_SPREAD, generator)
        tensors["lm_head.weight"][END_ID] = 0
    return tensors


def _draw_mlp(hidden: int, intermediate: int, generator: torch.Generator, prefix: str) -> Tensors:
    tensors = {f"{prefix}{name}_proj.weight": _draw(intermediate, hidden, 1.2, generator) for name in ("gate", "up")}
    return tensors | {f"{prefix}down_proj.weight": _draw(hidden, intermediate, 1.2, generator)}


def _draw_experts(shape: TinyShape, generator: torch.Generator, prefix: str) -> Tensors:
    """A router and its experts; the router's logits are spread by 3, so that a tie for the last place is rare."""
    tensors = {f"{prefix}gate.weight": _draw(shape.num_experts, shape.hidden_size, 3.0, generator)}
    for expert in range(shape.num_experts):
        name = f"{prefix}experts.{expert}."
        tensors |= _draw_mlp(shape.hidden_size, shape.moe_intermediate_size, generator, name)
    return tensors


def _biased(family: str, attention_bias: bool) -> str:
    """Kinds of attention projections that have a bias."""
    has_bias_key = FAMILIES[family].has_bias_key
    assert has_bias_key or not attention_bias, f"the config of {family} has no attention_bias"
    return FAMILIES[family].biased if attention_bias or not has_bias_key else ""


def _draw_projections(
    shape: TinyShape,
    generator: torch.Generator,
    layer: int,
    kinds: str,
    suffix: str,
    biased: str,
) -> Tensors:
    """Attention projections of one layer, with a bias for the kinds in `biased`.

    The gains are a compromise: scores spread by about 2, so that attention is peaked and greedy text does not
    collapse into one token, yet two correct fp32 implementations still agree within 1e-4 in the logits.
    """
    queries, keys = (heads * shape.head_dim for heads in (shape.num_attention_heads, shape.num_key_value_heads))
    sizes = {
        "q": (queries, shape.hidden_size, 1.4),
        "k": (keys, shape.hidden_size, 1.4),
        "v": (keys, shape.hidden_size, 1.2),
        "o": (shape.hidden_size, queries, 1.2),
    }
    tensors = {}
    for kind in kinds:
        rows, columns, gain = sizes[kind]
        name = f"model.layers.{layer}.self_attn.{kind}_proj{suffix}"
        tensors[f"{name}.weight"] = _draw(rows, columns, gain, generator)
        if kind in biased:
            tensors[f"{name}.bias"] = 0.2 * torch.randn(rows, generator=generator)
    return tensors


def _draw(rows: int, columns: int, gain: float, generator: torch.Generator) -> torch.Tensor:
    """A random matrix that multiplies the size of what it is applied to by `gain`."""
    return torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns))


def _draw_norm(size: int, generator: torch.Generator) -> torch.Tensor:
    return 1 + 0.2 * torch.randn(size, generator=generator)


def _is_replaced(name: str, later: range) -> bool:
    """Whether a student does not need this teacher tensor: Q, K or V of a later layer."""
    parts = name.split(".")
    return parts[-2] in ("q_proj", "k_proj", "v_proj") and int(parts[2]) in later


def _build_config(
    shape: TinyShape,
    dtype: torch.dtype,
    tied: bool,
    attention_bias: bool,
    rope_scaling: dict[str, Any] | None,
    new_rope_keys: bool,
    family: str,
    sliding_window: int | None,
) -> dict[str, Any]:
    assert sliding_window is None or family == "mistral", f"sliding_window is Mistral's: give {family} config_changes"
    if new_rope_keys:
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta, **(rope_scaling or {})}}
    else:
        rope = {"rope_theta": shape.rope_theta, "rope_scaling": rope_scaling}
    return {
        "architectures": [f"{FAMILIES[family].class_prefix}ForCausalLM"],
        "model_type": family,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": shape.rms_norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": BEGIN_ID,
        "eos_token_id": END_ID,
        "pad_token_id": PAD_ID,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **rope,
        **_build_family_config(shape, attention_bias, family, sliding_window),
    }


def _build_family_config(
    shape: TinyShape, attention_bias: bool, family: str, sliding_window: int | None
) -> dict[str, Any]:
    """Keys that not every family's config.json has."""
    config: dict[str, Any] = {"attention_bias": attention_bias} if FAMILIES[family].has_bias_key else {}
    if family == "llama":
        config["mlp_bias"] = False
    elif family == "mistral":
        config["sliding_window"] = sliding_window
    else:
        # Published Qwen2 configs name a window, and layers for it, that are not in use; Qwen3's name no window.
        config |= {
            "use_sliding_window": False,
            "sliding_window": 32 if family == "qwen2" else None,
            "max_window_layers": shape.num_hidden_layers // 2,
        }
    if FAMILIES[family].has_experts:
        config |= {
            "num_experts": shape.num_experts,
            "num_experts_per_tok": shape.num_experts_per_tok,
            "moe_intermediate_size": shape.moe_intermediate_size,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(shape.mlp_only_layers),
        }
    return config


def _write_folder(
    folder: Path,
    config: dict[str, Any],
    tensors: Tensors,
    dtype: torch.dtype,
    num_shards: int,
    config_changes: dict[str, Any] | None,
) -> Path:
    write_tokenizer(folder, config["vocab_size"], config["max_position_embeddings"])
    changed = config | (config_changes or {})
    removed = {key for key, value in (config_changes or {}).items() if value is None}
    _write_json(folder / "config.json", {key: changed[key] for key in changed if key not in removed})
    ids = {"bos_token_id": BEGIN_ID, "eos_token_id": END_ID, "pad_token_id": PAD_ID}
    _write_json(folder / "generation_config.json", ids | {"do_sample": False})
    _write_tensors(folder, {name: tensor.to(dtype) for name, tensor in tensors.items()}, num_shards)
    return folder


def _write_tensors(folder: Path, tensors: Tensors, num_shards: int) -> None:
    metadata = {"format": "pt"}
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata)
        return
    names = sorted(tensors)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        inside = names[shard::num_shards]
        save_file({name: tensors[name] for name in inside}, folder / file, metadata)
        weight_map |= dict.fromkeys(inside, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
