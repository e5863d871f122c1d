"""SwiftKV models in Hugging Face form, one class per family: teacher and student in one set of weights.

The decoder layers are transformers' own of the family; the later ones carry the student's projections beside the
teacher's. The first layers are the teacher's and run once for both. The later layers run in one of two ways: as the
teacher's own (`run_teacher_half`) or as the student's (`run_student_half`), whose keys and values all come from the
boundary hidden state and whose queries have projections of their own. Everything else is shared.
Does not train (distill/), convert or store (convert.py, checkpoint.py).
Called by: distill/step.py, evaluate/compare.py; loaded by checkpoint.py and convert.py.
Calls: states.py, later_layer.py, families.py, and transformers' module of each family.
Source: SwiftKV (arXiv 2410.03960) section 3; tensor names as in Snowflake's published checkpoints.

Shapes: B rows, T tokens, S selected positions, D hidden, N query heads, K KV heads, H head size, V vocabulary.
"""

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from swiftkv.errors import CheckpointError
from swiftkv.families import FAMILIES, Family
from swiftkv.hf_config import CONFIG_CLASSES
from swiftkv.model.activation import use_in_place_silu
from swiftkv.model.later_layer import LaterLayer
from swiftkv.model.states import Boundary, LaterStates, take_positions
from swiftkv.spec import SwiftKVSpec

_IGNORED_BY_GENERATE = ("return_dict", "cache_position")
"""What `generate` passes along and asks nothing by."""


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
        use_in_place_silu(self.layers)
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

    def run_teacher_half(self, boundary: Boundary, positions_BS: Tensor | None = None) -> LaterStates:
        """The later layers as the teacher has them.

        With `positions_BS`, states of these positions (Shapes: [B, S] -> [B, S, D]): the last layer computes no others.
        Raises: CheckpointError if the checkpoint was stored without the teacher's own projections.
        """
        if not self.has_teacher:
            raise CheckpointError(
                "This checkpoint has no teacher: its later layers lack q_proj, k_proj and v_proj. "
                "Load a checkpoint that keeps them, or compare with the teacher's own folder."
            )
        hidden_BTD = boundary.hidden_BTD
        for layer in self.later_layers[:-1]:
            hidden_BTD = self._run_teacher_layer(layer, hidden_BTD, boundary)
        penultimate_BTD = hidden_BTD if positions_BS is None else take_positions(hidden_BTD, positions_BS)
        if not self.later_layers:
            return LaterStates(self.norm(penultimate_BTD), penultimate_BTD)
        if positions_BS is None:
            last_BTD = self._run_teacher_layer(self.later_layers[-1], hidden_BTD, boundary)
        else:
            queried = self._select(boundary, positions_BS)
            last_BTD = self.later_layers[-1].run_teacher_at(hidden_BTD, positions_BS, boundary, queried)
        return LaterStates(self.norm(last_BTD), penultimate_BTD)

    def run_student_half(self, boundary: Boundary, positions_BS: Tensor | None = None) -> LaterStates:
        """The later layers with keys and values from the boundary hidden state.

        With `positions_BS`, only at these positions (Shapes: [B, S] -> [B, S, D]): no other depends on their results.
        """
        queried = boundary if positions_BS is None else self._select(boundary, positions_BS)
        normed_BTD = self.norm_swiftkv(boundary.hidden_BTD)
        hidden_BTD = penultimate_BTD = queried.hidden_BTD
        key = value = normed_BTD  # replaced by the first layer, which leads its group
        for index, layer in enumerate(self.later_layers, start=self.spec.num_key_value_layers):
            penultimate_BTD = hidden_BTD
            source_BTD = normed_BTD if index in self.spec.leader_layers else None
            hidden_BTD, key, value = layer.run_student(hidden_BTD, source_BTD, key, value, boundary, queried)
        return LaterStates(self.norm(hidden_BTD), penultimate_BTD)

    def _select(self, boundary: Boundary, positions_BS: Tensor) -> Boundary:
        return boundary.select(positions_BS, self.config.num_attention_heads // self.config.num_key_value_heads)

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
