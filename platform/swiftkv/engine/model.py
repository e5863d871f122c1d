"""SwiftKV models in vLLM: the first half runs for every token, the later half only where logits are needed.

Rides on vLLM's fast prefill (`kv_sharing_fast_prefill`), made for models whose last layers reuse earlier KV:
for the trailing readers the runner builds attention metadata for the tokens that are sampled from and hands
the model their rows. Nothing of vLLM is patched. Without skipping both halves run on all rows. In the role
`prefill` there is only the first half.
Called by: vLLM, which finds the classes, one per row of families.py, through engine/plugin.py.
Calls: engine/layers.py, engine/attention.py, engine/weights.py.
Source: the pattern of two compiled halves is that of Gemma 3n in vLLM 0.29.

Shapes: T tokens of the step, R rows of the later half (R <= T), D hidden, V vocabulary.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsQuant
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.v1.attention.backends.utils import KVSharingFastPrefillMetadata

from swiftkv.engine.attention import KVHolder
from swiftkv.engine.blueprint import Blueprint
from swiftkv.engine.layers import build_first_layer, build_later_layer
from swiftkv.engine.settings import ROLE_KEY
from swiftkv.engine.weights import has_tensor_files, place_tensors, read_prefill_tensors
from swiftkv.families import FAMILIES


@support_torch_compile
class FirstHalf(nn.Module):
    """Embeddings and first layers for all tokens, and the KV of all later layers from their output."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", model: "SwiftKVModel") -> None:
        super().__init__()
        self.embed_tokens, self.layers = model.embed_tokens, model.layers[: model.blueprint.spec.num_key_value_layers]
        self.norm_swiftkv, self.kv_holders = model.norm_swiftkv, model.kv_holders

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

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", model: "SwiftKVModel") -> None:
        super().__init__()
        self.layers, self.norm = model.layers[model.blueprint.spec.num_key_value_layers :], model.norm

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

    def __init__(self, *, vllm_config: VllmConfig, prefix: str, prefill_only: bool) -> None:
        super().__init__()
        self.blueprint = blueprint = Blueprint.from_vllm_config(vllm_config)
        spec, hidden_size, layers = blueprint.spec, blueprint.shape.hidden_size, f"{prefix}.layers"
        self.embed_tokens = VocabParallelEmbedding(
            blueprint.shape.vocab_size,
            hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        self.layers = nn.ModuleList(build_first_layer(blueprint, layers, i) for i in range(spec.num_key_value_layers))
        self.norm_swiftkv = blueprint.build_norm(hidden_size)
        # All holders before the first reader: vLLM skips only in the last unbroken run of sharing layers.
        self.kv_holders = nn.ModuleDict(
            {str(i): KVHolder(blueprint, f"{layers}.{i}.self_attn") for i in spec.leader_layers}
        )
        with set_model_tag("swiftkv_first_half"):
            self.first_half = FirstHalf(vllm_config=vllm_config, prefix=f"{prefix}.first_half", model=self)
        self.later_half = None
        if prefill_only:
            return
        later = range(spec.num_key_value_layers, spec.shape.num_hidden_layers)
        self.layers.extend(build_later_layer(blueprint, layers, i) for i in later)
        self.norm = blueprint.build_norm(hidden_size)
        with set_model_tag("swiftkv_later_half"):
            self.later_half = LaterHalf(vllm_config=vllm_config, prefix=f"{prefix}.later_half", model=self)
        self._last_reader = f"{layers}.{spec.shape.num_hidden_layers - 1}.self_attn.attn"
        # CUDA graphs of the later half read their inputs at fixed addresses.
        max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._rows_RD = torch.zeros(max_tokens, hidden_size, dtype=self.norm.weight.dtype)
        self._row_positions_R = torch.zeros(max_tokens, dtype=torch.int64)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states, right at every row that is sampled from and zero at prompt rows that are skipped.

        In the role `prefill`, the residual stream at the cut. Shapes: input_ids [T], positions [T] -> [T, D].
        """
        boundary_TD, _ = self.first_half(input_ids, positions, inputs_embeds)
        if self.later_half is None:
            return boundary_TD
        rows_R, num_rows = self._find_rows()
        # Copied even when all rows go on: a CUDA graph that is captured without metadata replays with it.
        if rows_R is None:
            padded = boundary_TD.shape[0]
            self._rows_RD[:padded].copy_(boundary_TD)
            self._row_positions_R[:padded].copy_(positions)
        else:  # the runner pads the rows to a size that a CUDA graph was captured for
            padded = rows_R.shape[0]
            torch.index_select(boundary_TD, 0, rows_R, out=self._rows_RD[:padded])
            torch.index_select(positions, 0, rows_R, out=self._row_positions_R[:padded])
        later_RD = self.later_half(self._rows_RD[:padded], self._row_positions_R[:padded])
        if rows_R is None:
            return later_RD
        output_TD = torch.zeros_like(boundary_TD)
        output_TD[rows_R[:num_rows]] = later_RD[:num_rows]
        return output_TD

    def _find_rows(self) -> tuple[torch.Tensor | None, int]:
        """Rows of this step whose logits are needed (padded), and how many; None means all of them."""
        metadata = get_forward_context().attn_metadata  # None in vLLM's profiling runs
        if metadata is None:
            return None, 0
        assert isinstance(metadata, dict), "steps that are cut in two are refused by the verifier"
        reader_metadata: Any = metadata.get(self._last_reader)
        if not isinstance(reader_metadata, KVSharingFastPrefillMetadata):
            return None, 0
        rows_R = reader_metadata.logits_indices_padded
        if rows_R is None:
            return None, 0
        assert reader_metadata.num_logits_indices
        return rows_R, reader_metadata.num_logits_indices


class SwiftKVForCausalLM(nn.Module, SupportsQuant, SupportsLoRA):
    """A SwiftKV model of any family, as vLLM loads it from a checkpoint in the published format."""

    packed_modules_mapping = {  # noqa: RUF012  vLLM reads it from the class
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "kv_proj_swiftkv": ["k_proj_swiftkv", "v_proj_swiftkv"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj.": (".qkv_proj.", "q"),
            ".k_proj.": (".qkv_proj.", "k"),
            ".v_proj.": (".qkv_proj.", "v"),
            ".k_proj_swiftkv.": (".kv_proj_swiftkv.", "k"),
            ".v_proj_swiftkv.": (".kv_proj_swiftkv.", "v"),
            ".mlp.gate_proj.": (".mlp.gate_up_proj.", 0),  # and not the experts', which vLLM stacks itself
            ".mlp.up_proj.": (".mlp.gate_up_proj.", 1),
        },
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.folder = Path(vllm_config.model_config.model)
        self.prefill_only = vllm_config.additional_config.get(ROLE_KEY) == "prefill"
        self.model = SwiftKVModel(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"), prefill_only=self.prefill_only
        )
        self.spec = self.model.blueprint.spec
        self.hf_to_vllm_mapper = self._build_mapper()
        if self.prefill_only:
            return
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
        assert intermediate_tensors is None, "pipeline stages are refused by the verifier"
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits of the rows given; of no meaning in the role `prefill`. Shapes: [R, D] -> [R, V]."""
        if self.prefill_only:
            return self._build_unused_logits(hidden_states)
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load what serving needs of a checkpoint, see engine/weights.py.

        A prefill half opens the folder itself: vLLM's `weights` come with their bytes already read. Where the folder
        holds no tensors, they are streamed (serving/streaming.py), and only those that are needed.
        """
        if self.prefill_only and has_tensor_files(self.folder):
            placed = read_prefill_tensors(self.folder, self.spec)
        else:
            placed = place_tensors(weights, self.spec, self.prefill_only)
        return AutoWeightsLoader(self).load_weights(placed, mapper=self.hf_to_vllm_mapper)

    def _build_unused_logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """Logits whose token ends no answer: NIXL hands over the KV only of requests that ran to their length."""
        ends = self.config.eos_token_id
        end_ids = ends if isinstance(ends, list) else [ends]
        token = next(i for i in reversed(range(self.config.vocab_size)) if i not in end_ids)
        logits_RV = hidden_RD.new_zeros(hidden_RD.shape[0], self.config.vocab_size)
        logits_RV[:, token] = 100.0
        return logits_RV

    def _build_mapper(self) -> WeightsMapper:
        """The class's mapper, and names for an adapter's tensors past the cut that vLLM refuses as unknown modules."""
        later = "|".join(str(i) for i in range(self.spec.num_key_value_layers, self.spec.shape.num_hidden_layers))
        past_cut = re.compile(rf"(\.layers\.(?:{later})\..+)\.(lora_[AB]\.)")
        return WeightsMapper(
            orig_to_new_regex={past_cut: r"\1.no_adapter_past_the_swiftkv_cut.\2"} if later else {},
            orig_to_new_stacked=self.hf_to_vllm_mapper.orig_to_new_stacked,
        )


globals().update({f.architecture: type(f.architecture, (SwiftKVForCausalLM,), {}) for f in FAMILIES.values()})
