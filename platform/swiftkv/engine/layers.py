"""One decoder layer of a SwiftKV model, first or later: they differ in their attention only.

Called by: engine/model.py. Calls: engine/attention.py, engine/blueprint.py.

Shapes: T tokens, D hidden.
"""

import torch
from torch import nn

from swiftkv.engine.attention import FirstAttention, ReaderAttention
from swiftkv.engine.blueprint import Blueprint


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind its norm; `prefix` is the layer's name (`….layers.N`)."""

    def __init__(self, blueprint: Blueprint, prefix: str, attention: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = blueprint.build_norm(blueprint.shape.hidden_size)
        self.self_attn = attention
        self.post_attention_layernorm = blueprint.build_norm(blueprint.shape.hidden_size)
        self.mlp = blueprint.build_mlp(f"{prefix}.mlp")

    def forward(
        self, positions: torch.Tensor, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer adds to the residual stream last, and the stream before that. Shapes: [T, D] -> 2 x [T, D]."""
        if residual_TD is None:
            residual_TD, hidden_TD = hidden_TD, self.input_layernorm(hidden_TD)
        else:
            hidden_TD, residual_TD = self.input_layernorm(hidden_TD, residual_TD)
        hidden_TD = self.self_attn(positions, hidden_TD)
        hidden_TD, residual_TD = self.post_attention_layernorm(hidden_TD, residual_TD)
        return self.mlp(hidden_TD), residual_TD


def build_first_layer(blueprint: Blueprint, layers: str, layer: int) -> DecoderLayer:
    """A layer that runs for every token; `layers` is the name of the list of layers (`….layers`)."""
    prefix = f"{layers}.{layer}"
    return DecoderLayer(blueprint, prefix, FirstAttention(blueprint, f"{prefix}.self_attn"))


def build_later_layer(blueprint: Blueprint, layers: str, layer: int) -> DecoderLayer:
    """A layer that reads its group's KV; the group's holder must exist already."""
    prefix, leader = f"{layers}.{layer}", f"{layers}.{blueprint.spec.leader_of(layer)}"
    return DecoderLayer(blueprint, prefix, ReaderAttention(blueprint, f"{prefix}.self_attn", f"{leader}.self_attn"))
