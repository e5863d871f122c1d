"""The two kinds of attention in the later half of a SwiftKV model: KV holders and readers.

A *holder* owns the KV cache of one group of later layers; it is filled for all tokens and never attended
through. A *reader* is a later layer's attention: it has queries only and attends through its group's holder.
Does not decide which tokens run where (that is engine/model.py).
Source: vLLM 0.29, kv_sharing_target_layer_name in model_executor/layers/attention/attention.py.

Shapes: T tokens, D hidden, N query heads, K KV heads, H head size.
"""

from typing import Any

import torch
from torch import nn
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import _encode_layer_name, unified_kv_cache_update
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.utils import extract_layer_index

from swiftkv.errors import ConfigError
from swiftkv.spec import SwiftKVSpec


class KVHolder(nn.Module):
    """K and V projections and the KV cache of one group of later layers."""

    def __init__(self, config: Any, vllm_config: VllmConfig, bias: bool, prefix: str) -> None:
        super().__init__()
        shape = SwiftKVSpec.from_hf_config(config.to_dict()).shape
        # No query heads: a QKV projection of which only the K and V shards exist, with vLLM's own rules for
        # sharding and replicating KV heads under tensor parallelism.
        self.kv_proj_swiftkv = QKVParallelLinear(
            hidden_size=shape.hidden_size,
            head_size=shape.head_dim,
            total_num_heads=0,
            total_num_kv_heads=shape.num_key_value_heads,
            bias=bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.kv_proj_swiftkv",
        )
        self.rotary_emb = _build_rotary(config, shape.head_dim)
        self.attn = _build_attention(shape, vllm_config.cache_config, vllm_config.quant_config, prefix, None)
        if self.attn.attn_backend.forward_includes_kv_cache_update:
            raise ConfigError(
                f"Attention backend {self.attn.attn_backend.get_name()} writes KV inside attention, but SwiftKV "
                "writes KV of layers that do not attend. Choose another with --attention-backend."
            )

    def forward(self, positions: torch.Tensor, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Fill the group's KV cache for all tokens.

        Returns an empty tensor that the caller must consume: vLLM's cache update declares no mutation, so a
        compiler deletes it when nothing depends on its result.
        """
        key_value, _ = self.kv_proj_swiftkv(hidden_TD)
        key, value = key_value.chunk(2, dim=-1)
        key, _ = self.rotary_emb(positions, key.contiguous(), None)
        key_TKH = key.view(-1, self.attn.num_kv_heads, self.attn.head_size)
        value_TKH = value.view(-1, self.attn.num_kv_heads, self.attn.head_size)
        if self.attn.use_direct_call:
            return unified_kv_cache_update(key_TKH, value_TKH, self.attn.layer_name)
        return torch.ops.vllm.unified_kv_cache_update(key_TKH, value_TKH, _encode_layer_name(self.attn.layer_name))


class ReaderAttention(nn.Module):
    """Attention of one later layer: own queries, the group's KV. Built by vLLM's `LlamaDecoderLayer`."""

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        quant_config: QuantizationConfig | None = None,
        bias: bool = False,
        bias_o_proj: bool = False,
        cache_config: CacheConfig | None = None,
        prefix: str = "",
        **_: Any,
    ) -> None:
        super().__init__()
        spec = SwiftKVSpec.from_hf_config(config.to_dict())
        head_dim = spec.shape.head_dim
        self.q_proj_swiftkv = ColumnParallelLinear(
            hidden_size,
            num_heads * head_dim,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.q_proj_swiftkv",
        )
        self.o_proj = RowParallelLinear(
            num_heads * head_dim,
            hidden_size,
            bias=bias_o_proj,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary_emb = _build_rotary(config, head_dim)
        layer = extract_layer_index(prefix)
        holder = name_holder(prefix.replace(f".{layer}.", f".{spec.leader_of(layer)}."))
        self.attn = _build_attention(spec.shape, cache_config, quant_config, f"{prefix}.attn", holder)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Attention output of the rows given. Shapes: positions [T], hidden [T, D] -> [T, D]."""
        query, _ = self.q_proj_swiftkv(hidden_states)
        query, _ = self.rotary_emb(positions, query, None)
        attended = self.attn(query, None, None)
        output, _ = self.o_proj(attended)
        return output


def name_holder(attention_prefix: str) -> str:
    """Name of the KV cache that the group led by this attention module (`….layers.N.self_attn`) shares."""
    return f"{attention_prefix}.kv_holder"


def _build_rotary(config: Any, head_dim: int) -> nn.Module:
    return get_rope(
        head_dim,
        max_position=config.max_position_embeddings,
        rope_parameters=config.rope_parameters,
        is_neox_style=True,
    )


def _build_attention(
    shape: Any,
    cache_config: CacheConfig | None,
    quant_config: QuantizationConfig | None,
    prefix: str,
    holder: str | None,
) -> Attention:
    # Per-rank head counts, the same for holders and readers: vLLM groups layers by their KV cache spec.
    ranks = get_tensor_model_parallel_world_size()
    return Attention(
        shape.num_attention_heads // ranks,
        shape.head_dim,
        shape.head_dim**-0.5,
        num_kv_heads=max(1, shape.num_key_value_heads // ranks),
        cache_config=cache_config,
        quant_config=quant_config,
        prefix=prefix,
        kv_sharing_target_layer_name=holder,
    )
