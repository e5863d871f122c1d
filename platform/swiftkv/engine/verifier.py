"""Completes vLLM's config of a SwiftKV model and refuses what cannot work, before anything is loaded.

Does not refuse requests (engine/requests.py).
Called by: vLLM, at the start of `VllmConfig.__post_init__`.
"""

from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from swiftkv.engine.requests import NoPromptLogprobs, RemotePrefillOnly, ValidatorsBeforeEngine
from swiftkv.engine.settings import ROLE_KEY, SKIPPING_KEY
from swiftkv.errors import ConfigError
from swiftkv.families import FAMILIES
from swiftkv.spec import SwiftKVSpec

_LORA_MODULES = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "self_attn.o_proj": ("o_proj",),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
    "mlp.down_proj": ("down_proj",),
}
"""What an adapter can change in a first layer, and what adapters call it."""

_SPECULATION = ("ngram", "ngram_gpu", "suffix")
"""Methods that read nothing of the model but its tokens."""


class SwiftKVVerifier(VerifyAndUpdateConfig):
    """vLLM's hook for SwiftKV checkpoints, registered for every family."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Sets vLLM's fast prefill unless the user switched skipping off, and keeps LoRA to the first layers.

        Raises: ConfigError naming the setting that cannot work with SwiftKV and what to do instead.
        """
        config = vllm_config.model_config.hf_config
        spec = SwiftKVSpec.from_hf_config(config.to_dict())
        FAMILIES[config.model_type].verify(config)
        prefill_only = _read_role(vllm_config) == "prefill"
        skipping = _read_skipping(vllm_config)
        _refuse_what_cannot_work(vllm_config, skipping or prefill_only)
        if prefill_only:
            _verify_prefill_half(vllm_config, spec, skipping)
        elif skipping:
            vllm_config.cache_config.kv_sharing_fast_prefill = True
            _choose_cuda_graphs(vllm_config)
            _add_validator(vllm_config, NoPromptLogprobs)
        if vllm_config.lora_config is not None:
            vllm_config.lora_config.target_modules = _list_lora_modules(vllm_config, spec)
            _spare_a_slot_on_cpu(vllm_config.lora_config)


def _read_role(vllm_config: VllmConfig) -> str:
    role = vllm_config.additional_config.get(ROLE_KEY, "full")
    if role not in ("full", "prefill"):
        raise ConfigError(f"additional_config[{ROLE_KEY!r}] is {role!r}: give 'full' or 'prefill'.")
    return str(role)


def _read_skipping(vllm_config: VllmConfig) -> bool:
    skipping = vllm_config.additional_config.get(SKIPPING_KEY, True)
    if not isinstance(skipping, bool):
        raise ConfigError(f"additional_config[{SKIPPING_KEY!r}] is {skipping!r}: give true or false.")
    return skipping


def _refuse_what_cannot_work(vllm_config: VllmConfig, skipping: bool) -> None:
    parallel, speculation = vllm_config.parallel_config, vllm_config.speculative_config
    if parallel.pipeline_parallel_size > 1:
        raise ConfigError(
            f"pipeline_parallel_size is {parallel.pipeline_parallel_size}: a SwiftKV model "
            "cannot be cut into pipeline stages. Use tensor_parallel_size instead."
        )
    if vllm_config.model_config.dtype == torch.float32 and _has_int8_activations(vllm_config) and _has_amx():
        raise ConfigError(
            "dtype is float32, but vLLM's int8 products on a CPU with AMX take half precision only. Use bfloat16."
        )
    if not skipping:
        return
    if vllm_config.model_config.runner_type != "generate":
        raise ConfigError(
            f"runner is {vllm_config.model_config.runner_type!r}: prompt tokens skip the later layers of a SwiftKV "
            f"model, so it has no embeddings of them. Set additional_config {SKIPPING_KEY} to false."
        )
    if parallel.use_ubatching:
        raise ConfigError(
            "enable_dbo (or ubatch_size) is set: a step that is cut in two cannot skip the later layers of a "
            f"SwiftKV model. Switch it off, or set additional_config {SKIPPING_KEY} to false."
        )
    if speculation is not None and speculation.method not in _SPECULATION:
        raise ConfigError(
            f"speculative method {speculation.method!r} needs more of a SwiftKV model than its tokens: prompt tokens "
            f"skip the later layers. Use one of {', '.join(_SPECULATION)}."
        )


def _has_int8_activations(vllm_config: VllmConfig) -> bool:
    quantisation = vllm_config.model_config.hf_config.to_dict().get("quantization_config") or {}
    activations = [group.get("input_activations") or {} for group in quantisation.get("config_groups", {}).values()]
    return any(kind.get("type") == "int" and kind.get("num_bits") == 8 for kind in activations)


def _has_amx() -> bool:
    return current_platform.is_cpu() and bool(torch.cpu.get_capabilities().get("amx_tile"))


def _choose_cuda_graphs(vllm_config: VllmConfig) -> None:
    """Graphs of whole steps only where each request has one token: others cannot be captured with fast prefill."""
    mode, speculates = vllm_config.compilation_config.cudagraph_mode, vllm_config.speculative_config is not None
    if mode is None and speculates:
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    elif mode is not None and mode.has_full_cudagraphs() and (speculates or mode == CUDAGraphMode.FULL):
        better = "PIECEWISE" if speculates else "FULL_AND_PIECEWISE"
        raise ConfigError(
            f"cudagraph_mode is {mode.name}, which captures steps with several tokens of a request: vLLM cannot do "
            f"that while prompt tokens skip layers. Use {better}, or set additional_config {SKIPPING_KEY} to false."
        )


def _verify_prefill_half(vllm_config: VllmConfig, spec: SwiftKVSpec, skipping: bool) -> None:
    transfer = vllm_config.kv_transfer_config
    if transfer is None or not transfer.is_kv_producer:
        raise ConfigError(
            f"additional_config {ROLE_KEY} is 'prefill': this engine can do nothing but fill KV for another one. "
            "Give it a kv_transfer_config with kv_role kv_producer, or serve the role 'full'."
        )
    if not skipping:
        raise ConfigError(
            f"additional_config has {ROLE_KEY} 'prefill' and {SKIPPING_KEY} false, but a prefill half lacks the "
            "later layers. Leave one of them out."
        )
    if vllm_config.speculative_config is not None:
        raise ConfigError("speculative_config is set, but a prefill half decodes nothing. Leave it out.")
    if not spec.num_later_layers:
        raise ConfigError("This checkpoint has no later layers to leave out. Serve it with the role 'full'.")
    _add_validator(vllm_config, RemotePrefillOnly)


def _add_validator(vllm_config: VllmConfig, validator: type) -> None:
    name = f"{validator.__module__}:{validator.__name__}"
    chosen = vllm_config.model_config.logits_processors
    vllm_config.model_config.logits_processors = [*chosen, name] if chosen else ValidatorsBeforeEngine([name])


def _list_lora_modules(vllm_config: VllmConfig, spec: SwiftKVSpec) -> list[str]:
    """Full names of the first layers' projections, those of the user's `target_modules` if given.

    Past the cut adapters are unsafe: LoRA's kernels find a token's adapter by its row in the whole batch.
    """
    wanted: Any = vllm_config.lora_config.target_modules
    if FAMILIES[vllm_config.model_config.hf_config.model_type].mlp == "experts":
        raise ConfigError("enable_lora is on: adapters of models with experts are not supported. Switch it off.")
    modules = [
        module
        for module, names in _LORA_MODULES.items()
        if wanted is None or {module.rpartition(".")[2], *names} & set(wanted)
    ]
    if not modules:
        known = sorted(name for names in _LORA_MODULES.values() for name in names)
        raise ConfigError(f"LoRA target_modules are {wanted}: give some of {', '.join(known)}.")
    return [f"model.layers.{layer}.{module}" for layer in range(spec.num_key_value_layers) for module in modules]


def _spare_a_slot_on_cpu(lora_config: Any) -> None:
    """vLLM's CPU kernels give rows without an adapter that of the last slot, which therefore has to stay empty."""
    if current_platform.is_cpu():
        lora_config.max_loras += 1
        lora_config.max_cpu_loras = max(lora_config.max_cpu_loras, lora_config.max_loras)
