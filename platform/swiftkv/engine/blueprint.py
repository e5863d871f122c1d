"""What every layer of one SwiftKV model is built from: config, spec, family, and vLLM's building blocks.

Holds no weights.
Called by: engine/attention.py, engine/layers.py, engine/model.py.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.qwen3_moe import Qwen3MoeSparseMoeBlock

from swiftkv.families import FAMILIES, Family
from swiftkv.spec import ModelShape, SwiftKVSpec


@dataclass(frozen=True)
class Blueprint:
    """Builds the parts of a layer; `prefix` is the part's name in the checkpoint, which quantisation goes by."""

    config: Any
    """The Hugging Face config."""
    vllm_config: VllmConfig
    spec: SwiftKVSpec
    family: Family

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig) -> "Blueprint":
        """The blueprint of the model that vLLM is loading."""
        config = vllm_config.model_config.hf_config
        return cls(config, vllm_config, SwiftKVSpec.from_hf_config(config.to_dict()), FAMILIES[config.model_type])

    @property
    def shape(self) -> ModelShape:
        """The sizes of the model, all ranks together."""
        return self.spec.shape

    def build_norm(self, size: int) -> RMSNorm:
        """An RMSNorm over this many values."""
        return RMSNorm(size, eps=self.config.rms_norm_eps)

    def build_head_norm(self) -> nn.Module:
        """What one head of Q or K goes through before it is rotated; nothing in most families."""
        return self.build_norm(self.shape.head_dim) if self.family.norms_heads else nn.Identity()

    def build_rotary(self) -> nn.Module:
        """Rotary position embeddings of Q and K."""
        return get_rope(
            self.shape.head_dim,
            max_position=self.config.max_position_embeddings,
            rope_parameters=self.config.rope_parameters,
            is_neox_style=True,
        )

    def build_qkv_projection(self, prefix: str, has_queries: bool) -> QKVParallelLinear:
        """Q, K and V, or K and V alone, with vLLM's own rules for sharding and replicating KV heads."""
        return QKVParallelLinear(
            hidden_size=self.shape.hidden_size,
            head_size=self.shape.head_dim,
            total_num_heads=self.shape.num_attention_heads if has_queries else 0,
            total_num_kv_heads=self.shape.num_key_value_heads,
            bias=self.family.has_qkv_bias(self.config),
            quant_config=self.vllm_config.quant_config,
            prefix=prefix,
        )

    def build_query_projection(self, prefix: str) -> ColumnParallelLinear:
        """Q alone."""
        return ColumnParallelLinear(
            self.shape.hidden_size,
            self.shape.num_attention_heads * self.shape.head_dim,
            bias=self.family.has_qkv_bias(self.config),
            quant_config=self.vllm_config.quant_config,
            prefix=prefix,
        )

    def build_output_projection(self, prefix: str) -> RowParallelLinear:
        """From the heads back to the residual stream."""
        return RowParallelLinear(
            self.shape.num_attention_heads * self.shape.head_dim,
            self.shape.hidden_size,
            bias=self.family.has_output_bias(self.config),
            quant_config=self.vllm_config.quant_config,
            prefix=prefix,
        )

    def build_attention(self, prefix: str, holder: str | None = None) -> Attention:
        """vLLM's attention with a KV cache named `prefix`, or with that of `holder`.

        Head counts are per rank and the same everywhere: vLLM groups layers by their KV cache spec.
        """
        ranks = get_tensor_model_parallel_world_size()
        attention = Attention(
            self.shape.num_attention_heads // ranks,
            self.shape.head_dim,
            self.shape.head_dim**-0.5,
            num_kv_heads=max(1, self.shape.num_key_value_heads // ranks),
            cache_config=self.vllm_config.cache_config,
            quant_config=self.vllm_config.quant_config,
            per_layer_sliding_window=self.family.find_sliding_window(self.config),
            prefix=prefix,
            kv_sharing_target_layer_name=holder,
        )
        # A decode engine computes the last prompt token again, so KV stays for one token more than the next one needs;
        # this is the window of the cache, that of the kernels is the implementation's.
        if attention.sliding_window is not None and self.vllm_config.kv_transfer_config is not None:
            attention.sliding_window += 1
        return attention

    def build_mlp(self, prefix: str) -> nn.Module:
        """The layer's MLP, or its router and experts."""
        if self.family.mlp == "experts":
            return Qwen3MoeSparseMoeBlock(self.vllm_config, prefix=prefix)
        return LlamaMLP(
            hidden_size=self.shape.hidden_size,
            intermediate_size=self.shape.intermediate_size,
            hidden_act=self.config.hidden_act,
            quant_config=self.vllm_config.quant_config,
            bias=getattr(self.config, "mlp_bias", False),
            prefix=prefix,
        )
