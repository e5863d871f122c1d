"""The three kinds of attention in a SwiftKV model: first layers, KV holders and readers.

A *first* layer attends as in any decoder. A *holder* owns the KV cache of one group of later layers; it is filled
for all tokens and never attended through. A *reader* is a later layer's attention: it has queries only and attends
through its group's holder. Does not decide which tokens run where (that is engine/model.py).
Calls: engine/blueprint.py.
Source: vLLM 0.29, kv_sharing_target_layer_name in model_executor/layers/attention/attention.py.

Shapes: T tokens, D hidden, N query heads, K KV heads, H head size.
"""

import torch
from torch import nn
from vllm.model_executor.layers.attention.attention import _encode_layer_name, unified_kv_cache_update
from vllm.model_executor.layers.layernorm import RMSNorm

from swiftkv.engine.blueprint import Blueprint
from swiftkv.errors import ConfigError


class FirstAttention(nn.Module):
    """Attention of one first layer, whose module is named `prefix` (`….layers.N.self_attn`)."""

    def __init__(self, blueprint: Blueprint, prefix: str) -> None:
        super().__init__()
        self.qkv_proj = blueprint.build_qkv_projection(f"{prefix}.qkv_proj", has_queries=True)
        self.q_norm, self.k_norm = blueprint.build_head_norm(), blueprint.build_head_norm()
        self.rotary_emb = blueprint.build_rotary()
        self.attn = blueprint.build_attention(f"{prefix}.attn")
        self.o_proj = blueprint.build_output_projection(f"{prefix}.o_proj")

    def forward(self, positions: torch.Tensor, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Attention output. Shapes: positions [T], hidden [T, D] -> [T, D]."""
        attn = self.attn
        query_key_value, _ = self.qkv_proj(hidden_TD)
        sizes = [heads * attn.head_size for heads in (attn.num_heads, attn.num_kv_heads, attn.num_kv_heads)]
        query, key, value = query_key_value.split(sizes, dim=-1)
        query, key = _apply_to_heads(self.q_norm, query), _apply_to_heads(self.k_norm, key)
        query, key = self.rotary_emb(positions, query, key)
        output, _ = self.o_proj(attn(query, key, value))
        return output


class KVHolder(nn.Module):
    """K and V projections and the KV cache of a group of later layers; `prefix` (`….layers.N.self_attn`) leads it."""

    def __init__(self, blueprint: Blueprint, prefix: str) -> None:
        super().__init__()
        self.kv_proj_swiftkv = blueprint.build_qkv_projection(f"{prefix}.kv_proj_swiftkv", has_queries=False)
        self.k_norm = blueprint.build_head_norm()
        self.rotary_emb = blueprint.build_rotary()
        self.attn = blueprint.build_attention(name_holder(prefix))
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
        key, _ = self.rotary_emb(positions, _apply_to_heads(self.k_norm, key.contiguous()), None)
        key_TKH = key.view(-1, self.attn.num_kv_heads, self.attn.head_size)
        value_TKH = value.view(-1, self.attn.num_kv_heads, self.attn.head_size)
        if self.attn.use_direct_call:
            return unified_kv_cache_update(key_TKH, value_TKH, self.attn.layer_name)
        return torch.ops.vllm.unified_kv_cache_update(key_TKH, value_TKH, _encode_layer_name(self.attn.layer_name))


class ReaderAttention(nn.Module):
    """Attention of one later layer: own queries, the KV of the group that `leader_prefix` leads."""

    def __init__(self, blueprint: Blueprint, prefix: str, leader_prefix: str) -> None:
        super().__init__()
        self.q_proj_swiftkv = blueprint.build_query_projection(f"{prefix}.q_proj_swiftkv")
        self.q_norm = blueprint.build_head_norm()
        self.rotary_emb = blueprint.build_rotary()
        self.attn = blueprint.build_attention(f"{prefix}.attn", holder=name_holder(leader_prefix))
        self.o_proj = blueprint.build_output_projection(f"{prefix}.o_proj")

    def forward(self, positions: torch.Tensor, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Attention output of the rows given. Shapes: positions [T], hidden [T, D] -> [T, D]."""
        query, _ = self.q_proj_swiftkv(hidden_TD)
        query, _ = self.rotary_emb(positions, _apply_to_heads(self.q_norm, query), None)
        output, _ = self.o_proj(self.attn(query, None, None))
        return output


def name_holder(leader_prefix: str) -> str:
    """Name of the KV cache of the group that this attention module (`….layers.N.self_attn`) leads."""
    return f"{leader_prefix}.kv_holder"


def _apply_to_heads(norm: nn.Module, projected: torch.Tensor) -> torch.Tensor:
    """The norm over each head, where the family has one. Shapes: [T, heads * H] -> the same."""
    if not isinstance(norm, RMSNorm):
        return projected
    return norm(projected.view(projected.shape[0], -1, norm.hidden_size)).view(projected.shape)
