"""The forward pass of a teacher and of its SwiftKV in plain fp32 tensors: what every other test is compared with.

Knows Llama, Mistral, Qwen2, Qwen3 and Qwen3-MoE. Written from the definition of each alone, with nothing of the
package and no model library, so that a mistake there is not repeated here. Slow and simple: no batches, no padding,
one sequence at a time.
Called by: tests. Calls: torch, safetensors.

Shapes: T tokens of this call, S tokens attended to, D hidden, N query heads, K key-value heads, H head size,
V vocabulary, A tokens of an answer, E experts, C experts that a token chooses. Tensors are fp32 throughout (or
whatever dtype the given weights have).
Source: SwiftKV fact sheet sections 1 and 6 (arXiv 2410.03960, section 3); the teachers as their papers and configs
define them, with transformers' defaults for keys that a config leaves out.
"""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

Config = dict[str, object]
Weights = dict[str, Tensor]
Cache = dict[int, tuple[Tensor, Tensor]]  # layer that owns it -> keys [S, K, H] and values [S, K, H]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
"""Teachers' model types; a student's ends in `_swiftkv`."""


def load_weights(folder: Path | str) -> tuple[Config, Weights]:
    """config.json and every tensor of every safetensors file in the folder, cast to fp32."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    weights: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                assert name not in weights, f"{name} is in two files"
                weights[name] = tensors.get_tensor(name).float()
    assert weights, f"no safetensors in {folder}"
    return config, weights


def compute_logits(config: Config, weights: Weights, token_ids: list[int], mode: str = "student") -> Tensor:
    """Logits [T, V] at every position of the sequence, by full causal attention."""
    return _forward(config, weights, token_ids, mode, {})


def compute_hidden_states(
    config: Config, weights: Weights, token_ids: list[int], mode: str = "student"
) -> list[Tensor]:
    """The residual stream [T, D] entering layer 0, 1, ... L-1, and the one leaving the last layer (no norm)."""
    return _run_layers(config, weights, token_ids, mode, {})


def generate_greedy(
    config: Config, weights: Weights, prompt_ids: list[int], max_new_tokens: int, mode: str = "student"
) -> list[int]:
    """Exactly `max_new_tokens` most likely tokens (end tokens do not stop it); the prompt is not repeated."""
    cache: Cache = {}
    token = _best(_forward(config, weights, prompt_ids, mode, cache))
    generated = [token]
    while len(generated) < max_new_tokens:
        token = _best(_forward(config, weights, [token], mode, cache))
        generated.append(token)
    return generated


def compute_log_probs(
    config: Config, weights: Weights, prompt_ids: list[int], answer_ids: list[int], mode: str = "student"
) -> Tensor:
    """Log-probabilities [A, V] at the positions that predict the answer: row i is what follows answer_ids[:i]."""
    logits = compute_logits(config, weights, [*prompt_ids, *answer_ids], mode)
    return torch.log_softmax(logits[len(prompt_ids) - 1 : -1], dim=-1)


def compute_top2_gap(
    config: Config,
    weights: Weights,
    prompt_ids: list[int],
    generated_ids: list[int],
    mode: str = "student",
) -> list[float]:
    """For each generated position, log p(best) - log p(second best) in nats.

    A small gap is a position where another arithmetic may rightly choose another token.
    """
    top = compute_log_probs(config, weights, prompt_ids, generated_ids, mode).topk(2, dim=-1).values
    return (top[:, 0] - top[:, 1]).tolist()


def turn_near_ties(config: Config, weights: Weights, token_ids: list[int], gap: float) -> list[Config]:
    """For each routing whose last expert chosen and first one left out are within `gap`, closest first: a config
    in which the token goes to the other one. Rounding decides such a routing, so either is right.
    """
    gaps: dict[tuple[str, int], float] = {}
    compute_hidden_states(config | {"gaps": gaps}, weights, token_ids)
    return [config | {"turned": routing} for routing in sorted(gaps, key=gaps.__getitem__) if gaps[routing] < gap]


def _best(logits: Tensor) -> int:
    return int(logits[-1].argmax())


@torch.no_grad()
def _forward(config: Config, weights: Weights, token_ids: list[int], mode: str, cache: Cache) -> Tensor:
    hidden = _run_layers(config, weights, token_ids, mode, cache)[-1]
    hidden = _rms_norm(hidden, weights["model.norm.weight"], config)
    tied = config.get("tie_word_embeddings", False)
    return hidden @ weights["model.embed_tokens.weight" if tied else "lm_head.weight"].T


@torch.no_grad()
def _run_layers(config: Config, weights: Weights, token_ids: list[int], mode: str, cache: Cache) -> list[Tensor]:
    """Run tokens that follow those in `cache` (empty: a new sequence), and add their keys and values to it."""
    assert config.get("hidden_act", "silu") == "silu"
    num_layers = config["num_hidden_layers"]
    num_kv_layers = _num_kv_layers(config, mode)
    start = cache[0][0].shape[0] if cache else 0
    rotation = _rotation(config, start, len(token_ids))

    hidden = weights["model.embed_tokens.weight"][torch.tensor(token_ids)]
    states = [hidden]
    for layer in range(num_layers):
        if layer == num_kv_layers:
            _append_later_keys_values(config, weights, hidden, rotation, cache)
        prefix = f"model.layers.{layer}."
        normed = _rms_norm(hidden, weights[prefix + "input_layernorm.weight"], config)
        if layer < num_kv_layers:
            owner = layer
            query = _query(config, weights, layer, "", normed, rotation)
            _append_keys_values(config, weights, layer, "", normed, rotation, cache)
        else:
            owner = _leader(config, layer)
            query = _query(config, weights, layer, "_swiftkv", normed, rotation)
        attended = _attend(query, *cache[owner], start, _window(config, layer))
        hidden = hidden + _linear(weights, prefix + "self_attn.o_proj", attended)
        normed = _rms_norm(hidden, weights[prefix + "post_attention_layernorm.weight"], config)
        hidden = hidden + _mlp(config, weights, prefix + "mlp.", normed)
        states.append(hidden)
    return states


def _family(config: Config) -> str:
    family = str(config["model_type"]).removesuffix("_swiftkv")
    assert family in FAMILIES, f"model type {config['model_type']!r} is not in the reference"
    return family


def _num_kv_layers(config: Config, mode: str) -> int:
    if mode == "teacher":
        return config["num_hidden_layers"]
    assert mode == "student", f"mode is {mode!r}: student or teacher"
    assert config.get("num_key_value_layers"), "not a SwiftKV checkpoint: use mode='teacher'"
    return config["num_key_value_layers"]


def _window(config: Config, layer: int) -> int | None:
    """How many tokens, itself included, a query of this layer attends to; None: all that came before.

    A later layer's own number counts, whichever layer made the keys it reads.
    """
    family = _family(config)
    if family == "mistral":
        return config.get("sliding_window", 4096)
    if family == "llama" or not config.get("use_sliding_window", False):
        return None
    if family == "qwen3_moe":
        slides = True
    elif config.get("layer_types"):
        slides = config["layer_types"][layer] == "sliding_attention"
    else:
        slides = layer >= config.get("max_window_layers", 28)
    return config.get("sliding_window", 4096) if slides else None


def _leader(config: Config, layer: int) -> int:
    first, group = config["num_key_value_layers"], config.get("key_value_group_size", 1)
    return first + (layer - first) // group * group


def _append_later_keys_values(
    config: Config, weights: Weights, boundary: Tensor, rotation: Tensor, cache: Cache
) -> None:
    """Keys and values of every later layer, all from the one hidden state that enters the first of them."""
    num_layers, group = config["num_hidden_layers"], config.get("key_value_group_size", 1)
    normed = _rms_norm(boundary, weights["model.norm_swiftkv.weight"], config)
    for leader in range(config["num_key_value_layers"], num_layers, group):
        _append_keys_values(config, weights, leader, "_swiftkv", normed, rotation, cache)


def _append_keys_values(
    config: Config, weights: Weights, layer: int, suffix: str, normed: Tensor, rotation: Tensor, cache: Cache
) -> None:
    attention = f"model.layers.{layer}.self_attn."
    shape = (len(normed), config.get("num_key_value_heads") or config["num_attention_heads"], _head_dim(config))
    key = _linear(weights, f"{attention}k_proj{suffix}", normed).reshape(shape)
    key = _rotate(_norm_heads(config, weights, f"{attention}k_norm", key), rotation)
    value = _linear(weights, f"{attention}v_proj{suffix}", normed).reshape(shape)
    if layer in cache:
        key, value = torch.cat([cache[layer][0], key]), torch.cat([cache[layer][1], value])
    cache[layer] = (key, value)


def _query(config: Config, weights: Weights, layer: int, suffix: str, normed: Tensor, rotation: Tensor) -> Tensor:
    attention = f"model.layers.{layer}.self_attn."
    shape = (len(normed), config["num_attention_heads"], _head_dim(config))
    query = _linear(weights, f"{attention}q_proj{suffix}", normed).reshape(shape)
    return _rotate(_norm_heads(config, weights, f"{attention}q_norm", query), rotation)


def _norm_heads(config: Config, weights: Weights, name: str, heads: Tensor) -> Tensor:
    """Qwen3's RMSNorm over each head [T, heads, H] by itself; a student's layers use their own, as the teacher's."""
    if _family(config) not in ("qwen3", "qwen3_moe"):
        return heads
    return _rms_norm(heads, weights[name + ".weight"], config)


def _attend(query_TNH: Tensor, key_SKH: Tensor, value_SKH: Tensor, start: int, window: int | None) -> Tensor:
    """Causal attention [T, N*H]; query row t is position start + t. Query head i reads key head i // (N / K)."""
    num_tokens, num_heads, head_dim = query_TNH.shape
    repeats = num_heads // key_SKH.shape[1]
    key_SNH = key_SKH.repeat_interleave(repeats, dim=1)
    value_SNH = value_SKH.repeat_interleave(repeats, dim=1)
    scores_NTS = torch.einsum("tnh,snh->nts", query_TNH, key_SNH) / math.sqrt(head_dim)
    query_position = torch.arange(start, start + num_tokens)[:, None]
    key_position = torch.arange(len(key_SNH))[None, :]
    unseen = key_position > query_position
    if window is not None:
        unseen = unseen | (key_position <= query_position - window)
    probabilities_NTS = scores_NTS.masked_fill(unseen, float("-inf")).softmax(dim=-1)
    return torch.einsum("nts,snh->tnh", probabilities_NTS, value_SNH).reshape(num_tokens, num_heads * head_dim)


def _mlp(config: Config, weights: Weights, prefix: str, normed: Tensor) -> Tensor:
    """The dense MLP, or a mixture of such where the checkpoint has a router."""
    if prefix + "gate.weight" not in weights:
        return _dense_mlp(weights, prefix, normed)
    chosen, shares = _route(config, weights, prefix, normed)
    mixed = torch.zeros_like(normed)
    for expert in chosen.unique().tolist():
        token, choice = (chosen == expert).nonzero(as_tuple=True)
        outputs = _dense_mlp(weights, f"{prefix}experts.{expert}.", normed[token])
        mixed[token] += shares[token, choice][:, None] * outputs
    return mixed


def _route(config: Config, weights: Weights, prefix: str, normed: Tensor) -> tuple[Tensor, Tensor]:
    """The experts that each token goes to [T, C], and the share of the sum that each of them has [T, C]."""
    num_chosen = config["num_experts_per_tok"]
    shares, chosen = (normed @ weights[prefix + "gate.weight"].T).softmax(dim=-1).sort(dim=-1, descending=True)
    for token, gap in enumerate((shares[:, num_chosen - 1] - shares[:, num_chosen]).tolist()):
        config.get("gaps", {})[prefix, token] = gap
        if (prefix, token) == config.get("turned"):
            last = [num_chosen, num_chosen - 1]
            shares[token, last[::-1]], chosen[token, last[::-1]] = shares[token, last], chosen[token, last]
    shares, chosen = shares[:, :num_chosen], chosen[:, :num_chosen]
    if config.get("norm_topk_prob", False):
        shares = shares / shares.sum(dim=-1, keepdim=True)
    return chosen, shares


def _dense_mlp(weights: Weights, prefix: str, normed: Tensor) -> Tensor:
    gate = _linear(weights, prefix + "gate_proj", normed)
    up = _linear(weights, prefix + "up_proj", normed)
    return _linear(weights, prefix + "down_proj", gate * torch.sigmoid(gate) * up)


def _linear(weights: Weights, name: str, inputs: Tensor) -> Tensor:
    """A projection; a bias is added where the checkpoint has one."""
    outputs = inputs @ weights[name + ".weight"].T
    bias = weights.get(name + ".bias")
    return outputs if bias is None else outputs + bias


def _rms_norm(hidden: Tensor, weight: Tensor, config: Config) -> Tensor:
    mean_square = hidden.pow(2).mean(dim=-1, keepdim=True)
    return weight * (hidden * torch.rsqrt(mean_square + config.get("rms_norm_eps", 1e-6)))


def _head_dim(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    """RoPE on [T, heads, H]: component i turns together with component i + H/2, by the angle [T, H/2]."""
    cos, sin = rotation.cos()[:, None, :], rotation.sin()[:, None, :]
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _rotation(config: Config, start: int, num_tokens: int) -> Tensor:
    """Angles [T, H/2] in radians of positions start ... start + T - 1: rounded in the order of training."""
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    half = _head_dim(config) // 2
    frequencies = 1.0 / theta ** (torch.arange(half, dtype=torch.float32) / half)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "llama3":
        frequencies = torch.tensor([_scale_llama3(float(f), rope) for f in frequencies])
    elif kind == "linear":
        frequencies = frequencies / rope["factor"]
    else:
        assert kind == "default", f"rope type {kind!r} is not in the reference"
    positions = torch.arange(start, start + num_tokens, dtype=torch.float32)
    return positions[:, None] * frequencies[None, :]


def _scale_llama3(frequency: float, rope: dict) -> float:
    """Llama 3.1's scaling: long waves are slowed by `factor`, short ones kept, those between blended."""
    waves_in_context = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = min(max((waves_in_context - low) / (high - low), 0.0), 1.0)
    return kept * frequency + (1 - kept) * frequency / rope["factor"]
