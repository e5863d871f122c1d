"""Tells vLLM about SwiftKV models: class names, config classes, and the settings that skipping needs.

Nothing of vLLM is replaced. vLLM calls `register` in every process it starts, through the
`vllm.general_plugins` entry point of the installed package.
Calls: engine/verifier.py before anything is loaded; engine/model.py by name, when vLLM first needs a class.
Source: vLLM 0.29, `ModelRegistry` and `MODELS_CONFIG_MAP` (model_executor/models/config.py).
"""

import torch
from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

from swiftkv.engine.verifier import SwiftKVVerifier
from swiftkv.families import FAMILIES
from swiftkv.hf_config import register_config_classes


def register() -> None:
    """Register every family's classes with transformers and vLLM. May be called again."""
    # vLLM's attention uses AMX's tiles without asking Linux for them. A product of several rows asks, by oneDNN; if the
    # first prompt has one token, none comes before, and the engine dies of an illegal instruction.
    torch.cpu._init_amx()
    register_config_classes()
    for family in FAMILIES.values():
        ModelRegistry.register_model(family.architecture, f"swiftkv.engine.model:{family.architecture}")
        MODELS_CONFIG_MAP[family.architecture] = SwiftKVVerifier
