"""What a SwiftKV model is: which layers hold KV, and what a token costs in FLOPs, KV bytes and weight bytes.

Arithmetic on a Hugging Face config alone; loads no weights and measures nothing.
Called by: everything that plans, reports or builds a model.
Source: fact sheet of SwiftKV (arXiv 2410.03960 section 3 for the accounting).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swiftkv.errors import ConfigError


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder, as its config.json gives them."""

    hidden_size: int
    intermediate_size: int
    """Of the MLP, or of each expert."""
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = False
    num_experts: int = 0
    """Experts of each layer; 0 is one MLP instead."""
    num_experts_per_tok: int = 0
    """Experts that a token runs through."""

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> "ModelShape":
        """The shape in a Hugging Face config.json, with the defaults that transformers uses.

        Raises: ConfigError naming the key that is missing.
        """
        required = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
        )
        missing = [key for key in required if not config.get(key)]
        if missing:
            raise ConfigError(f"The model config lacks {', '.join(missing)}. Give a decoder's config.json.")
        heads = int(config["num_attention_heads"])
        num_experts = int(config.get("num_experts") or config.get("num_local_experts") or 0)
        return cls(
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["moe_intermediate_size" if num_experts else "intermediate_size"]),
            num_hidden_layers=int(config["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocab_size=int(config["vocab_size"]),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            num_experts=num_experts,
            num_experts_per_tok=int(config.get("num_experts_per_tok") or 0) if num_experts else 0,
        )

    @property
    def query_parameters(self) -> int:
        """Weights of one layer's Q projection (O has as many)."""
        return self.hidden_size * self.num_attention_heads * self.head_dim

    @property
    def key_value_parameters(self) -> int:
        """Weights of one layer's K and V projections together."""
        return 2 * self.hidden_size * self.num_key_value_heads * self.head_dim

    @property
    def mlp_parameters(self) -> int:
        """Weights of one layer's gate, up and down projections, of all experts and with their router."""
        return self._count_mlp_parameters(self.num_experts)

    @property
    def active_mlp_parameters(self) -> int:
        """Those of them that a token runs through."""
        return self._count_mlp_parameters(self.num_experts_per_tok)

    def _count_mlp_parameters(self, experts: int) -> int:
        one = 3 * self.hidden_size * self.intermediate_size
        return one * experts + self.hidden_size * self.num_experts if self.num_experts else one

    @property
    def vocab_parameters(self) -> int:
        """Weights of one vocabulary table (embeddings, or LM head)."""
        return self.hidden_size * self.vocab_size


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of one token by part; a multiply and an add count as two."""

    key_value: float
    query_output: float
    mlp: float
    attention: float

    @property
    def total(self) -> float:
        """Everything but embeddings and LM head, which depend on how many tokens are sampled."""
        return self.key_value + self.query_output + self.mlp + self.attention


@dataclass(frozen=True)
class SwiftKVSpec:
    """A decoder whose layers from `num_key_value_layers` on read KV computed from one hidden state.

    `num_key_value_layers == shape.num_hidden_layers` is the unmodified teacher.
    """

    shape: ModelShape
    num_key_value_layers: int
    """Number of first layers that run for every token (n)."""
    key_value_group_size: int = 1
    """How many neighbouring later layers share one KV cache (AcrossKV); 1 shares nothing."""

    def __post_init__(self) -> None:
        layers, kept, group = (
            self.shape.num_hidden_layers,
            self.num_key_value_layers,
            self.key_value_group_size,
        )
        if not 1 <= kept <= layers:
            raise ConfigError(
                f"num_key_value_layers is {kept}, but the model has {layers} layers: "
                f"choose 1 to {layers} (about half of them is usual)."
            )
        if group < 1 or (layers - kept) % group:
            fitting = [size for size in range(1, layers - kept + 1) if (layers - kept) % size == 0] or [1]
            raise ConfigError(
                f"key_value_group_size is {group}, which does not divide the {layers - kept} later layers "
                f"({layers} layers - {kept} KV layers): choose one of {fitting}."
            )

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> "SwiftKVSpec":
        """The spec in a SwiftKV config.json; a config without `num_key_value_layers` is a teacher's."""
        shape = ModelShape.from_hf_config(config)
        kept, group = config.get("num_key_value_layers"), config.get("key_value_group_size")
        return cls(
            shape,
            shape.num_hidden_layers if kept is None else int(kept),
            1 if group is None else int(group),
        )

    @property
    def teacher(self) -> "SwiftKVSpec":
        """The same shape with every layer computed for every token."""
        return SwiftKVSpec(self.shape, self.shape.num_hidden_layers)

    @property
    def num_later_layers(self) -> int:
        """Layers that a prompt token skips."""
        return self.shape.num_hidden_layers - self.num_key_value_layers

    @property
    def leader_layers(self) -> range:
        """First layer of each group: the ones whose K and V projections exist."""
        return range(self.num_key_value_layers, self.shape.num_hidden_layers, self.key_value_group_size)

    def leader_of(self, layer: int) -> int:
        """The group leader whose KV cache a later layer reads."""
        assert self.num_key_value_layers <= layer < self.shape.num_hidden_layers
        return layer - (layer - self.num_key_value_layers) % self.key_value_group_size

    @property
    def num_kv_caches(self) -> int:
        """KV caches per token: one per first layer and one per group."""
        return self.num_key_value_layers + len(self.leader_layers)

    def compute_prompt_token_flops(self, prompt_tokens: int) -> TokenFlops:
        """FLOPs of one token of a prompt of this length that is not sampled from, averaged over the prompt.

        Causal attention over half the prompt's length; later layers cost their K and V projections only.
        """
        return self._compute_token_flops(self.num_key_value_layers, prompt_tokens / 2)

    def compute_decoded_token_flops(self, context_tokens: int) -> TokenFlops:
        """FLOPs of decoding one token that attends to `context_tokens`; every layer runs."""
        return self._compute_token_flops(self.shape.num_hidden_layers, context_tokens)

    def compute_lm_head_flops(self) -> float:
        """FLOPs of the LM head for one sampled token."""
        return 2.0 * self.shape.vocab_parameters

    def compute_prefill_speedup(self, prompt_tokens: int) -> float:
        """How many times fewer FLOPs a prompt token costs than in the teacher, without embeddings and LM head."""
        teacher = self.teacher.compute_prompt_token_flops(prompt_tokens).total
        return teacher / self.compute_prompt_token_flops(prompt_tokens).total

    def compute_kv_bytes_per_token(self, bytes_per_value: float = 2) -> float:
        """Bytes of KV cache that one token occupies in all layers (2 bytes per value: bf16; 1: FP8)."""
        values = 2 * self.shape.num_key_value_heads * self.shape.head_dim
        return self.num_kv_caches * values * bytes_per_value

    def count_trained_parameters(self) -> int:
        """Parameters that distillation trains, biases left out: Q per later layer, K and V per group, a norm."""
        if not self.num_later_layers:
            return 0
        query = self.num_later_layers * self.shape.query_parameters
        return query + len(self.leader_layers) * self.shape.key_value_parameters + self.shape.hidden_size

    def compute_weight_bytes(self, bytes_per_parameter: float = 2) -> float:
        """Bytes of weights that serving needs (2 bytes per parameter: bf16); biases and head norms are left out.

        The teacher's own projections of the later layers, which some checkpoints keep, are not counted.
        """
        shape = self.shape
        layers = shape.num_hidden_layers * (2 * shape.query_parameters + shape.mlp_parameters + 2 * shape.hidden_size)
        key_values = self.num_kv_caches * shape.key_value_parameters
        vocab = shape.vocab_parameters * (1 if shape.tie_word_embeddings else 2)
        norms = shape.hidden_size * (2 if self.num_later_layers else 1)
        return (layers + key_values + vocab + norms) * bytes_per_parameter

    def compute_prefill_weight_bytes(self, bytes_per_parameter: float = 2) -> float:
        """Bytes of weights on a prefill half: embeddings, the first layers, the norm at the cut, later K and V.

        A teacher has no half: all of its layers fill KV, and only the final norm and the LM head could be left out.
        """
        shape, first = self.shape, self.num_key_value_layers
        layers = first * (2 * shape.query_parameters + shape.mlp_parameters + 2 * shape.hidden_size)
        key_values = self.num_kv_caches * shape.key_value_parameters
        return (layers + key_values + shape.vocab_parameters + shape.hidden_size) * bytes_per_parameter

    def _compute_token_flops(self, layers_run: int, attended_tokens: float) -> TokenFlops:
        shape = self.shape
        query_size = shape.num_attention_heads * shape.head_dim
        return TokenFlops(
            key_value=2.0 * self.num_kv_caches * shape.key_value_parameters,
            query_output=2.0 * layers_run * 2 * shape.query_parameters,
            mlp=2.0 * layers_run * shape.active_mlp_parameters,
            attention=4.0 * layers_run * attended_tokens * query_size,
        )
