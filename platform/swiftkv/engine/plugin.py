"""Tells vLLM about SwiftKV models: class names, config classes, and the settings that skipping needs.

Registration only; nothing of vLLM is replaced. vLLM calls `register` in every process it starts, through the
`vllm.general_plugins` entry point of the installed package.
Calls: engine/model.py by name, when vLLM first needs the class.
Source: vLLM 0.29, `ModelRegistry` and `MODELS_CONFIG_MAP` (model_executor/models/config.py).
"""

from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from swiftkv.engine.settings import SKIPPING_KEY
from swiftkv.errors import ConfigError
from swiftkv.families import FAMILIES
from swiftkv.hf_config import register_config_classes
from swiftkv.spec import SwiftKVSpec


def register() -> None:
    """Register every family's classes with transformers and vLLM. May be called again."""
    register_config_classes()
    for family in FAMILIES.values():
        ModelRegistry.register_model(family.architecture, f"swiftkv.engine.model:{family.architecture}")
        MODELS_CONFIG_MAP[family.architecture] = SwiftKVVerifier


class SwiftKVVerifier(VerifyAndUpdateConfig):
    """Turns skipping on for SwiftKV checkpoints and refuses what cannot work, before anything is loaded."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Sets vLLM's fast prefill unless the user switched skipping off.

        Raises: ConfigError naming the setting that cannot work with SwiftKV and what to do instead.
        """
        SwiftKVSpec.from_hf_config(vllm_config.model_config.hf_config.to_dict())
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ConfigError(
                f"pipeline_parallel_size is {vllm_config.parallel_config.pipeline_parallel_size}: a SwiftKV model "
                "cannot be cut into pipeline stages. Use tensor_parallel_size instead."
            )
        if vllm_config.lora_config is not None:
            raise ConfigError("enable_lora is on: LoRA is not supported for SwiftKV models. Switch it off.")
        skipping = vllm_config.additional_config.get(SKIPPING_KEY, True)
        if not isinstance(skipping, bool):
            raise ConfigError(f"additional_config[{SKIPPING_KEY!r}] is {skipping!r}: give true or false.")
        vllm_config.cache_config.kv_sharing_fast_prefill = skipping
