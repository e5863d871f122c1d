"""SwiftKV models in Hugging Face form, one class per family: teacher and student in one set of weights.

The decoder layers are transformers' own of the family; the later ones carry the student's projections beside the
teacher's. The first layers are the teacher's and run once for both. The later layers run in one of two ways: as the
teacher's own (`run_teacher_half`) or as the student's (`run_student_half`), whose keys and values all come from the
boundary hidden state and whose queries have projections of their own. Everything else is shared.
Does not train (distill/), convert or store (convert.py, checkpoint.py).
Called by: distill/step.py, evaluate/compare.py; loaded by checkpoint.py and convert.py.
Calls: families.py, and transformers' module of each family.
Source: SwiftKV (arXiv 2410.03960) section 3; tensor names as in Snowflake's published checkpoints.

Shapes: B rows, T tokens, S selected positions, D hidden, N query heads, K KV heads, H head size, V vocabulary.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, rotate_half

from swiftkv.errors import CheckpointError
from swiftkv.families import FAMILIES, Family
from swiftkv.hf_config import CONFIG_CLASSES
from swiftkv.model.precision import find_product_dtype
from swiftkv.spec import SwiftKVSpec

_IGNORED_BY_GENERATE = ("return_dict", "cache_position")
"""What `generate` passes along and asks nothing by."""


@dataclass
class Boundary:
    """What the first half hands to the later half, the same for teacher and student."""

    hidden_BTD: Tensor
    """Residual stream entering layer `num_key_value_layers`."""
    position_embeddings: tuple[Tensor, Tensor]
    """Rotary cosines and sines of these positions, each [B or 1, T, H]."""
    causal_mask: Tensor | None
    """Mask in the form of the attention implementation in use; None means plain causal."""
    past_key_values: Cache | None = None
    folded_mask: Tensor | None = None
    """Of selected positions, added to scores; rows for every query head that shares a KV head: [B, 1, N/K * S, T]."""

    @classmethod
    def concatenate(cls, parts: Sequence["Boundary"]) -> "Boundary":
        """Rows that were run in several parts, which have no cache."""
        if len(parts) == 1:
            return parts[0]
        cos, sin = (
            torch.cat([part.position_embeddings[i].expand(len(part.hidden_BTD), -1, -1) for part in parts])
            for i in range(2)
        )
        masks = None
        if any(part.causal_mask is not None for part in parts):
            masks = torch.cat([part._expand_mask() for part in parts])
        return cls(torch.cat([part.hidden_BTD for part in parts]), (cos, sin), masks)

    def select(self, positions_BS: Tensor, heads_per_kv_head: int) -> "Boundary":
        """Some positions of each row, as queries that look back at all. Shapes: [B, S] -> S in place of T.

        For masks as sdpa and eager attention have them.
        """
        rows_B1 = torch.arange(len(positions_BS), device=positions_BS.device).unsqueeze(1)
        cos, sin = (part.expand(len(positions_BS), -1, -1)[rows_B1, positions_BS] for part in self.position_embeddings)
        # Once for all layers: what attention would make of a mask of booleans in each of them, and keep.
        seen_B1ST = self._select_mask(positions_BS).repeat(1, 1, heads_per_kv_head, 1)
        dtype = find_product_dtype(self.hidden_BTD)
        folded = torch.zeros(seen_B1ST.shape, dtype=dtype, device=positions_BS.device)
        folded.masked_fill_(~seen_B1ST, float("-inf"))
        return Boundary(self.hidden_BTD[rows_B1, positions_BS], (cos, sin), None, self.past_key_values, folded)

    def _select_mask(self, positions_BS: Tensor) -> Tensor:
        """What the positions see. Shapes: [B, S] -> [B, 1, S, T] bool."""
        if self.causal_mask is None:
            keys_T = torch.arange(self.hidden_BTD.shape[1], device=positions_BS.device)
            return (keys_T <= positions_BS.unsqueeze(-1)).unsqueeze(1)
        rows_B1 = torch.arange(len(positions_BS), device=positions_BS.device).unsqueeze(1)
        mask_B1ST = self._expand_mask()[:, 0][rows_B1, positions_BS].unsqueeze(1)
        return mask_B1ST if mask_B1ST.dtype == torch.bool else mask_B1ST >= 0

    def _expand_mask(self) -> Tensor:
        """The mask written out. Shapes: [B, 1, T, T]."""
        rows, num_tokens = self.hidden_BTD.shape[:2]
        mask = self.causal_mask
        if mask is None:
            mask = torch.ones(1, 1, num_tokens, num_tokens, dtype=torch.bool, device=self.hidden_BTD.device).tril()
        return mask.expand(rows, -1, -1, -1)


@dataclass
class LaterStates:
    """Hidden states out of the later half."""

    last_BTD: Tensor
    """After the final norm: what the LM head reads."""
    penultimate_BTD: Tensor
    """Residual stream after the second-to-last layer, which the hidden loss compares."""

    @classmethod
    def concatenate(cls, parts: Sequence["LaterStates"]) -> "LaterStates":
        """Rows that were run in several parts."""
        return cls(torch.cat([part.last_BTD for part in parts]), torch.cat([part.penultimate_BTD for part in parts]))

    def select(self, positions_BS: Tensor) -> "LaterStates":
        """Some positions of each row. Shapes: [B, S] -> S in place of T."""
        index = positions_BS.unsqueeze(-1)
        return LaterStates(self.last_BTD.take_along_dim(index, 1), self.penultimate_BTD.take_along_dim(index, 1))


class LaterLayer(nn.Module):
    """What a later layer is beside the family's decoder layer, whose `forward` is the teacher's: the student's.

    The families' classes (`_build_later_layer_class`) are made of this and of transformers' decoder layer.
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
        if source_BTD is not None:
            key, value = self._project_key_value(source_BTD, boundary)
        hidden_BSD = hidden_BSD + self._attend(self.input_layernorm(hidden_BSD), key, value, queried)
        return hidden_BSD + self.mlp(self.post_attention_layernorm(hidden_BSD)), key, value

    def _project_key_value(self, normed_BTD: Tensor, boundary: Boundary) -> tuple[Tensor, Tensor]:
        """The group's keys (rotated) and values, past ones included. Shapes: [B, T, D] -> 2 x [B, K, T, H]."""
        leader = self.self_attn
        key, value = (
            projection(normed_BTD).unflatten(-1, (-1, leader.head_dim))
            for projection in (leader.k_proj_swiftkv, leader.v_proj_swiftkv)
        )
        if self.norms_heads:
            key = leader.k_norm(key)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        key = _rotate(key, boundary)
        if boundary.past_key_values is not None:
            key, value = boundary.past_key_values.update(key, value, leader.layer_idx)
        return key, value

    def _attend(self, hidden_BSD: Tensor, key: Tensor, value: Tensor, queried: Boundary) -> Tensor:
        """Attention output of own queries over the group's keys and values. Shapes: [B, S, D] -> [B, S, D]."""
        attention = self.self_attn
        query = attention.q_proj_swiftkv(hidden_BSD).unflatten(-1, (-1, attention.head_dim))
        if self.norms_heads:
            query = attention.q_norm(query)
        query = query.transpose(1, 2)
        query = _rotate(query, queried)
        if queried.folded_mask is not None:
            attended = _attend_folded(query, key, value, queried.folded_mask, attention.scaling)
        else:
            attended = self._attend_everywhere(query, key, value, queried)
        output: Tensor = attention.o_proj(attended.reshape(*hidden_BSD.shape[:-1], -1))
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


class SwiftKVModel(nn.Module):
    """The decoder without LM head, in two halves."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.spec = SwiftKVSpec.from_hf_config(config.to_dict())
        self.family = FAMILIES[config.model_type]
        self.sliding_window = self.family.find_sliding_window(config)
        build_layer, build_norm, build_rotary = (
            _find_class(self.family, kind) for kind in ("DecoderLayer", "RMSNorm", "RotaryEmbedding")
        )
        build_later_layer = _build_later_layer_class(self.family)
        kept = self.spec.num_key_value_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            (build_layer if index < kept else build_later_layer)(config, index)
            for index in range(config.num_hidden_layers)
        )
        for index, layer in enumerate(self.later_layers, start=kept):
            _add_student_projections(layer.self_attn, is_leader=index in self.spec.leader_layers)
        self.norm = build_norm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm_swiftkv = build_norm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = build_rotary(config=config)

    @property
    def later_layers(self) -> list[Any]:
        """The layers that a prompt token skips when served."""
        return list(self.layers[self.spec.num_key_value_layers :])

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher's own projections of the later layers are there; stripped checkpoints lack them."""
        return all(layer.self_attn.q_proj is not None for layer in self.later_layers)

    def compute_boundary(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Boundary:
        """Run embeddings and first layers. Shapes: input_ids [B, T] -> hidden [B, T, D].

        `position_ids` [B, T] that start again at 0 within a row pack documents, none of which sees another.
        """
        hidden_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        create_mask = create_causal_mask if self.sliding_window is None else create_sliding_window_causal_mask
        causal_mask = create_mask(
            config=self.config,
            inputs_embeds=hidden_BTD,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,  # looked at for documents, which waits for the device: only if given
        )
        if position_ids is None:
            past_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past_tokens, past_tokens + hidden_BTD.shape[1], device=hidden_BTD.device)
            position_ids = position_ids.unsqueeze(0)
        boundary = Boundary(
            hidden_BTD, self.rotary_emb(hidden_BTD, position_ids=position_ids), causal_mask, past_key_values
        )
        for layer in self.layers[: self.spec.num_key_value_layers]:
            boundary.hidden_BTD = self._run_teacher_layer(layer, boundary.hidden_BTD, boundary)
        return boundary

    def run_teacher_half(self, boundary: Boundary) -> LaterStates:
        """The later layers as the teacher has them.

        Raises: CheckpointError if the checkpoint was stored without the teacher's own projections.
        """
        if not self.has_teacher:
            raise CheckpointError(
                "This checkpoint has no teacher: its later layers lack q_proj, k_proj and v_proj. "
                "Load a checkpoint that keeps them, or compare with the teacher's own folder."
            )
        hidden_BTD = penultimate_BTD = boundary.hidden_BTD
        for layer in self.later_layers:
            penultimate_BTD = hidden_BTD
            hidden_BTD = self._run_teacher_layer(layer, hidden_BTD, boundary)
        return LaterStates(self.norm(hidden_BTD), penultimate_BTD)

    def run_student_half(self, boundary: Boundary, positions_BS: Tensor | None = None) -> LaterStates:
        """The later layers with keys and values from the boundary hidden state.

        With `positions_BS`, only at these positions (Shapes: [B, S] -> [B, S, D]): no other depends on their results.
        """
        heads_per_kv_head = self.config.num_attention_heads // self.config.num_key_value_heads
        queried = boundary if positions_BS is None else boundary.select(positions_BS, heads_per_kv_head)
        normed_BTD = self.norm_swiftkv(boundary.hidden_BTD)
        hidden_BTD = penultimate_BTD = queried.hidden_BTD
        key = value = normed_BTD  # replaced by the first layer, which leads its group
        for index, layer in enumerate(self.later_layers, start=self.spec.num_key_value_layers):
            penultimate_BTD = hidden_BTD
            source_BTD = normed_BTD if index in self.spec.leader_layers else None
            hidden_BTD, key, value = layer.run_student(hidden_BTD, source_BTD, key, value, boundary, queried)
        return LaterStates(self.norm(hidden_BTD), penultimate_BTD)

    def _run_teacher_layer(self, layer: nn.Module, hidden_BTD: Tensor, boundary: Boundary) -> Tensor:
        output: Tensor = layer(
            hidden_BTD,
            attention_mask=boundary.causal_mask,
            position_embeddings=boundary.position_embeddings,
            past_key_values=boundary.past_key_values,
        )
        return output


class SwiftKVForCausalLM(PreTrainedModel):
    """The student as an ordinary Hugging Face causal LM; `forward(..., teacher=True)` is the teacher.

    The families' classes (`MODEL_CLASSES`) are made of this and of transformers' `…PreTrainedModel` of the family.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  transformers' own form

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.model = SwiftKVModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        teacher: bool = False,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the student, or of the teacher. Shapes: input_ids [B, T] -> logits [B, T, V].

        `logits_to_keep`: only the last so many positions (0: all), or the positions of an index tensor.
        Raises: TypeError for what other models' `forward` can do and this one cannot, such as `labels`.
        """
        refused = [name for name, value in others.items() if value and name not in _IGNORED_BY_GENERATE]
        if refused:
            raise TypeError(f"forward() of a SwiftKV model does not take {', '.join(refused)}.")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        boundary = self.model.compute_boundary(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        states = self.model.run_teacher_half(boundary) if teacher else self.model.run_student_half(boundary)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(states.last_BTD[:, kept])
        return CausalLMOutputWithPast(logits=logits_BTV, past_key_values=past_key_values)


def _find_class(family: Family, kind: str) -> Any:
    """Transformers' class of the family, such as its `DecoderLayer`."""
    name = family.teacher_model_type
    return getattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), family.class_prefix + kind)


def _build_later_layer_class(family: Family) -> Any:
    decoder_layer = _find_class(family, "DecoderLayer")
    attributes = {"norms_heads": family.norms_heads, "__module__": __name__}
    return type(f"{family.class_prefix}LaterLayer", (LaterLayer, decoder_layer), attributes)


def _add_student_projections(attention: Any, is_leader: bool) -> None:
    """Give a later layer's attention the student's projections, shaped as the teacher's own."""
    for kind in "qkv" if is_leader else "q":
        own: nn.Linear = getattr(attention, f"{kind}_proj")
        projection = nn.Linear(own.in_features, own.out_features, bias=own.bias is not None)
        attention.add_module(f"{kind}_proj_swiftkv", projection)


def _build_model_class(family: Family) -> type[SwiftKVForCausalLM]:
    if family.mlp == "experts":  # transformers stacks a layer's experts while it loads, by model_type
        stacking = get_checkpoint_conversion_mapping(family.teacher_model_type)
        register_checkpoint_conversion_mapping(family.model_type, stacking, overwrite=True)
    bases = (SwiftKVForCausalLM, _find_class(family, "PreTrainedModel"), GenerationMixin)
    config_class = CONFIG_CLASSES[family.model_type]
    attributes = {"config_class": config_class, "__module__": __name__, "__annotations__": {"config": config_class}}
    return type(family.architecture, bases, attributes)


MODEL_CLASSES = {model_type: _build_model_class(family) for model_type, family in FAMILIES.items()}
"""SwiftKV `model_type` -> model class."""
