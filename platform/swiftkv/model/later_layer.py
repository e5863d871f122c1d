"""A later layer as the student runs it: queries of its own, keys and values from the boundary hidden state.

And as the teacher runs its last one where only some positions are asked for.
Does not build layers of a family or decide which of them lead a group (modeling.py).
Called by: model/modeling.py.
Calls: transformers' attention, families.py.

Shapes: B rows, T tokens, S selected positions, D hidden, N query heads, K KV heads, H head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, rotate_half

from swiftkv.families import FAMILIES
from swiftkv.model.states import Boundary, take_positions


class LaterLayer(nn.Module):
    """What a later layer is beside the family's decoder layer, whose `forward` is the teacher's: the student's.

    The families' classes are made of this and of transformers' decoder layer (modeling.py).
    """

    self_attn: Any
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
    norms_heads: bool
    checkpoints_activations = False
    """Whether the student's activations are computed again in the backward pass instead of kept."""

    def run_student(
        self,
        hidden_BSD: Tensor,
        source_BTD: Tensor | None,
        key: Tensor,
        value: Tensor,
        boundary: Boundary,
        queried: Boundary,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's output, and the keys and values that it read.

        `source_BTD`: the normed boundary state, of which the first layer of a group makes keys and values; None reads
        those that are given.
        Shapes: hidden [B, S, D] of the positions in `queried` -> [B, S, D], 2 x [B, K, T, H].
        """
        if self.checkpoints_activations and torch.is_grad_enabled():
            # Inside of this method, so that sharded weights are gathered before the activations are computed again.
            result: tuple[Tensor, Tensor, Tensor] = checkpoint(
                self._compute_student, hidden_BSD, source_BTD, key, value, boundary, queried, use_reentrant=False
            )
            return result
        return self._compute_student(hidden_BSD, source_BTD, key, value, boundary, queried)

    def _compute_student(
        self,
        hidden_BSD: Tensor,
        source_BTD: Tensor | None,
        key: Tensor,
        value: Tensor,
        boundary: Boundary,
        queried: Boundary,
    ) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.self_attn
        if source_BTD is not None:
            projections = (attention.k_proj_swiftkv, attention.v_proj_swiftkv)
            key, value = self._project_key_value(source_BTD, boundary, *projections)
        query = attention.q_proj_swiftkv(self.input_layernorm(hidden_BSD))
        return self._complete(hidden_BSD, query, key, value, queried), key, value

    def run_teacher_at(self, hidden_BTD: Tensor, positions_BS: Tensor, boundary: Boundary, queried: Boundary) -> Tensor:
        """The layer's output as the teacher has it, at some positions only, which `queried` has too.

        Shapes: [B, T, D] -> [B, S, D]. Exactly what the family's decoder layer gives there: keys and values are made of
        all positions, everything else is of one position.
        """
        attention = self.self_attn
        normed_BTD = self.input_layernorm(hidden_BTD)
        key, value = self._project_key_value(normed_BTD, boundary, attention.k_proj, attention.v_proj)
        hidden_BSD, normed_BSD = (take_positions(states, positions_BS) for states in (hidden_BTD, normed_BTD))
        return self._complete(hidden_BSD, attention.q_proj(normed_BSD), key, value, queried)

    def _complete(self, hidden_BSD: Tensor, query_BSQ: Tensor, key: Tensor, value: Tensor, queried: Boundary) -> Tensor:
        """What follows the projections. Shapes: [B, S, D], [B, S, N * H] -> [B, S, D]."""
        hidden_BSD = hidden_BSD + self._attend(query_BSQ, key, value, queried)
        completed: Tensor = hidden_BSD + self.mlp(self.post_attention_layernorm(hidden_BSD))
        return completed

    def _project_key_value(
        self, normed_BTD: Tensor, boundary: Boundary, project_key: nn.Module, project_value: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """Keys (rotated) and values, past ones included. Shapes: [B, T, D] -> 2 x [B, K, T, H]."""
        attention = self.self_attn
        key, value = (
            project(normed_BTD).unflatten(-1, (-1, attention.head_dim)) for project in (project_key, project_value)
        )
        if self.norms_heads:
            key = attention.k_norm(key)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        key = _rotate(key, boundary)
        if boundary.past_key_values is not None:
            key, value = boundary.past_key_values.update(key, value, attention.layer_idx)
        return key, value

    def _attend(self, query_BSQ: Tensor, key: Tensor, value: Tensor, queried: Boundary) -> Tensor:
        """Attention output of projected queries over keys and values. Shapes: [B, S, N * H] -> [B, S, D]."""
        attention = self.self_attn
        query = query_BSQ.view(*query_BSQ.shape[:-1], -1, attention.head_dim)
        if self.norms_heads:
            query = attention.q_norm(query)
        query = query.transpose(1, 2)
        query = _rotate(query, queried)
        if queried.folded_mask is not None:
            attended = _attend_folded(query, key, value, queried.folded_mask, attention.scaling)
        else:
            attended = self._attend_everywhere(query, key, value, queried)
        output: Tensor = attention.o_proj(attended.reshape(*query_BSQ.shape[:-1], -1))
        return output

    def _attend_everywhere(self, query: Tensor, key: Tensor, value: Tensor, boundary: Boundary) -> Tensor:
        """With transformers' own attention. Shapes: [B, N, T, H], 2 x [B, K, T, H] -> [B, T, N, H]."""
        attention = self.self_attn
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        attended, _ = attend(
            attention,
            query,
            key,
            value,
            boundary.causal_mask,
            dropout=0.0,
            scaling=attention.scaling,
            sliding_window=FAMILIES[attention.config.model_type].find_sliding_window(attention.config),
        )
        everywhere: Tensor = attended
        return everywhere


def _rotate(heads: Tensor, boundary: Boundary) -> Tensor:
    """Queries or keys turned to their positions, as transformers turns both. Shapes: [B, N or K, T, H]."""
    cos, sin = (part.unsqueeze(1) for part in boundary.position_embeddings)
    return heads * cos + rotate_half(heads) * sin


def _attend_folded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Attention with query heads that share a KV head as rows of one head, so that nothing is repeated for them.

    Shapes: [B, N, S, H], 2 x [B, K, T, H] -> [B, S, N, H].
    """
    num_rows, kv_heads, _, head_size = key.shape
    folded = query.reshape(num_rows, kv_heads, -1, head_size)
    attended = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return attended.reshape(query.shape).transpose(1, 2)
