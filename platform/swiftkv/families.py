"""The one table of what differs between model families. Holds no layers: `model/` and `engine/` read it.

A family is added by adding a row here and a test: both sides build their classes from the row. What all rows have
in common is a pre-norm decoder with rotary embeddings, grouped-query attention and `gate`, `up` and `down`
projections. A family that is not in the table is refused by name.
Called by: model/, engine/, hf_config, cli (for publish).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from swiftkv.errors import CheckpointError


@dataclass(frozen=True)
class Family:
    """What one family of teachers is called, and how its layers differ from the others'."""

    teacher_model_type: str
    """`model_type` of the teacher's config.json, and the name of its module in transformers."""
    class_prefix: str
    """What the family's class names begin with: `Llama` in `LlamaForCausalLM`."""
    projection_bias: Literal["config", "qkv", "none"] = "config"
    """Biases of Q, K, V and O: all four if the config's `attention_bias` says so; always on Q, K and V; or none."""
    norms_heads: bool = False
    """Whether each head of Q and of K goes through an RMSNorm (`q_norm`, `k_norm`) before it is rotated."""
    mlp: Literal["dense", "experts"] = "dense"
    """One MLP per layer, or a router and experts."""

    @property
    def model_type(self) -> str:
        """`model_type` of the SwiftKV checkpoint."""
        return f"{self.teacher_model_type}_swiftkv"

    @property
    def architecture(self) -> str:
        """Class name in the SwiftKV checkpoint's `architectures`."""
        return f"{self.class_prefix}SwiftKVForCausalLM"

    def has_qkv_bias(self, config: Any) -> bool:
        """Whether Q, K and V projections carry biases, given the family's Hugging Face config."""
        return self.projection_bias == "qkv" or self.has_output_bias(config)

    def has_output_bias(self, config: Any) -> bool:
        """Whether O projections carry biases, given the family's Hugging Face config."""
        return self.projection_bias == "config" and bool(getattr(config, "attention_bias", False))

    def verify(self, config: Any) -> None:
        """Refuse the family's models whose layers are not all alike.

        Raises: CheckpointError naming the config's key.
        """
        self.find_sliding_window(config)
        if self.mlp == "experts" and (config.mlp_only_layers or config.decoder_sparse_step != 1):
            raise CheckpointError(
                f"Only some layers of this {self.teacher_model_type} model have experts (mlp_only_layers or "
                "decoder_sparse_step in config.json), which SwiftKV cannot serve yet. Choose a model whose layers are "
                "all alike."
            )

    def find_sliding_window(self, config: Any) -> int | None:
        """How many tokens back every layer attends, itself included; None means all of them.

        Raises: CheckpointError if only some layers have a window: a group's layers share one KV cache.
        """
        kinds = set(getattr(config, "layer_types", None) or ())
        window = getattr(config, "sliding_window", None)
        if window is None or kinds == {"full_attention"}:
            return None
        if len(kinds) > 1:
            raise CheckpointError(
                f"Only some layers of this {self.teacher_model_type} model have a sliding window (layer_types in "
                "config.json), which SwiftKV cannot serve yet. Choose a model whose layers are all alike."
            )
        return int(window)


_ROWS = (
    Family("llama", "Llama"),
    Family("mistral", "Mistral", projection_bias="none"),
    Family("qwen2", "Qwen2", projection_bias="qkv"),
    Family("qwen3", "Qwen3", norms_heads=True),
    Family("qwen3_moe", "Qwen3Moe", norms_heads=True, mlp="experts"),
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _ROWS}
"""SwiftKV `model_type` -> family."""

_BY_TEACHER: Mapping[str, Family] = {family.teacher_model_type: family for family in _ROWS}


def find_teacher_family(model_type: str | None) -> Family:
    """The family whose teacher has this `model_type`.

    Raises: CheckpointError naming the families there are.
    """
    family = _BY_TEACHER.get(model_type or "")
    if family is None:
        raise CheckpointError(
            f"Teacher has model_type {model_type!r}; families with a SwiftKV form are: "
            f"{', '.join(_BY_TEACHER)}. Choose a teacher of one of these."
        )
    return family
