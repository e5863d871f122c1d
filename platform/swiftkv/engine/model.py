"""SwiftKV models in vLLM: the first half runs for every token, the later half only where logits are needed.

Rides on vLLM's fast prefill (`kv_sharing_fast_prefill`), made for models whose last layers reuse earlier KV:
for the trailing readers the runner builds attention metadata for the tokens that are sampled from and hands
the model their rows. Nothing of vLLM is patched. Without skipping both halves run on all rows.
Called by: vLLM, which finds the classes through engine/plugin.py.
Calls: engine/attention.py; vLLM's Llama layers.
Source: the pattern of two compiled halves is that of Gemma 3n in vLLM 0.29.

Shapes: T tokens of the step, R rows of the later half (R <= T), D hidden.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.v1.attention.backends.utils import KVSharingFastPrefillMetadata

from swiftkv.engine.attention import KVHolder, ReaderAttention, name_holder
from swiftkv.families import FAMILIES
from swiftkv.spec import SwiftKVSpec


@support_torch_compile
class FirstHalf(nn.Module):
    """Embeddings and first layers for all tokens, and the KV of all later layers from their output."""

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        prefix: str = "",
        embed_tokens: nn.Module,
        layers: nn.ModuleList,
        norm_swiftkv: nn.Module,
        kv_holders: nn.ModuleDict,
    ) -> None:
        super().__init__()
        self.embed_tokens, self.layers = embed_tokens, layers
        self.norm_swiftkv, self.kv_holders = norm_swiftkv, kv_holders

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The residual stream at the cut, and the empty tensors that keep the KV writes alive.

        Shapes: input_ids [T] or inputs_embeds [T, D], positions [T] -> [T, D].
        """
        hidden_TD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        residual_TD = None
        for layer in self.layers:
            hidden_TD, residual_TD = layer(positions, hidden_TD, residual_TD)
        boundary_TD = hidden_TD if residual_TD is None else hidden_TD + residual_TD
        normed_TD = self.norm_swiftkv(boundary_TD)
        return boundary_TD, [holder(positions, normed_TD) for holder in self.kv_holders.values()]


@support_torch_compile
class LaterHalf(nn.Module):
    """The later layers and the final norm, on the rows it is given."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layers: nn.ModuleList, norm: nn.Module) -> None:
        super().__init__()
        self.layers, self.norm = layers, norm

    def forward(self, hidden_RD: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What the LM head reads. Shapes: hidden [R, D], positions [R] -> [R, D]."""
        residual_RD = None
        for layer in self.layers:
            hidden_RD, residual_RD = layer(positions, hidden_RD, residual_RD)
        if residual_RD is None:
            return self.norm(hidden_RD)
        hidden_RD, _ = self.norm(hidden_RD, residual_RD)
        return hidden_RD


class SwiftKVModel(nn.Module):
    """Both halves, and the choice of rows between them."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        spec = SwiftKVSpec.from_hf_config(config.to_dict())
        kept, num_layers = spec.num_key_value_layers, spec.shape.num_hidden_layers
        bias = FAMILIES[config.model_type].has_qkv_bias(config)

        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        first_layers = [LlamaDecoderLayer(vllm_config, f"{prefix}.layers.{i}") for i in range(kept)]
        # All holders before the first reader: vLLM skips only in the last unbroken run of sharing layers.
        self.kv_holders = nn.ModuleDict(
            {
                str(i): KVHolder(config, vllm_config, bias, name_holder(f"{prefix}.layers.{i}.self_attn"))
                for i in spec.leader_layers
            }
        )
        later_layers = [
            LlamaDecoderLayer(vllm_config, f"{prefix}.layers.{i}", attn_layer_type=ReaderAttention)
            for i in range(kept, num_layers)
        ]
        self.layers = nn.ModuleList(first_layers + later_layers)
        self.norm_swiftkv = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

        with set_model_tag("swiftkv_first_half"):
            self.first_half = FirstHalf(
                vllm_config=vllm_config,
                prefix=f"{prefix}.first_half",
                embed_tokens=self.embed_tokens,
                layers=self.layers[:kept],
                norm_swiftkv=self.norm_swiftkv,
                kv_holders=self.kv_holders,
            )
        with set_model_tag("swiftkv_later_half"):
            self.later_half = LaterHalf(
                vllm_config=vllm_config,
                prefix=f"{prefix}.later_half",
                layers=self.layers[kept:],
                norm=self.norm,
            )
        self._last_reader = f"{prefix}.layers.{num_layers - 1}.self_attn.attn"
        # CUDA graphs of the later half read their inputs at fixed addresses.
        max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._rows_RD = torch.zeros(max_tokens, config.hidden_size, dtype=self.norm.weight.dtype)
        self._row_positions_R = torch.zeros(max_tokens, dtype=torch.int64)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states, right at every row that is sampled from and zero at prompt rows that are skipped.

        Shapes: input_ids [T], positions [T] -> [T, D].
        """
        boundary_TD, _ = self.first_half(input_ids, positions, inputs_embeds)
        rows_R, num_rows = self._find_rows()
        if rows_R is None:
            return self.later_half(boundary_TD, positions)
        # The runner pads the rows to a size that a CUDA graph was captured for.
        padded = rows_R.shape[0]
        torch.index_select(boundary_TD, 0, rows_R, out=self._rows_RD[:padded])
        torch.index_select(positions, 0, rows_R, out=self._row_positions_R[:padded])
        later_RD = self.later_half(self._rows_RD[:padded], self._row_positions_R[:padded])
        output_TD = torch.zeros_like(boundary_TD)
        output_TD[rows_R[:num_rows]] = later_RD[:num_rows]
        return output_TD

    def _find_rows(self) -> tuple[torch.Tensor | None, int]:
        """Rows of this step whose logits are needed (padded), and how many; None means all of them."""
        metadata = get_forward_context().attn_metadata  # None in vLLM's profiling runs
        if not isinstance(metadata, dict):
            return None, 0
        reader_metadata: Any = metadata.get(self._last_reader)
        if not isinstance(reader_metadata, KVSharingFastPrefillMetadata):
            return None, 0
        rows_R = reader_metadata.logits_indices_padded
        if rows_R is None:
            return None, 0
        assert reader_metadata.num_logits_indices
        return rows_R, reader_metadata.num_logits_indices


class LlamaSwiftKVForCausalLM(nn.Module, SupportsQuant):
    """Llama with SwiftKV, as vLLM loads it from a checkpoint in the published format."""

    packed_modules_mapping = {  # noqa: RUF012  vLLM reads it from the class
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "kv_proj_swiftkv": ["k_proj_swiftkv", "v_proj_swiftkv"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_regex={
            re.compile(r"\.layers\.(\d+)\.self_attn\.([kv]_proj_swiftkv)"): r".kv_holders.\1.\2",
        },
        orig_to_new_stacked={
            ".q_proj.": (".qkv_proj.", "q"),
            ".k_proj.": (".qkv_proj.", "k"),
            ".v_proj.": (".qkv_proj.", "v"),
            ".k_proj_swiftkv.": (".kv_proj_swiftkv.", "k"),
            ".v_proj_swiftkv.": (".kv_proj_swiftkv.", "v"),
            ".gate_proj.": (".gate_up_proj.", 0),
            ".up_proj.": (".gate_up_proj.", 1),
        },
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.model = SwiftKVModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.config.vocab_size,
            self.config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if self.config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings. Shapes: [T] -> [T, D]."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states of the step, see `SwiftKVModel.forward`."""
        assert intermediate_tensors is None, "pipeline stages are refused by the plugin"
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits of the rows given. Shapes: [R, D] -> [R, V]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint; the teacher's own projections of the later layers, if there, are left out."""
        spec = SwiftKVSpec.from_hf_config(self.config.to_dict())
        later = "|".join(str(i) for i in range(spec.num_key_value_layers, spec.shape.num_hidden_layers))
        teacher_projection = re.compile(rf"\.layers\.({later})\.self_attn\.[qkv]_proj\.") if later else None
        wanted = (
            (name, tensor)
            for name, tensor in weights
            if teacher_projection is None or not teacher_projection.search(name)
        )
        return AutoWeightsLoader(self).load_weights(wanted, mapper=self.hf_to_vllm_mapper)
