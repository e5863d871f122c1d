"""Tiny random LoRA adapters in PEFT's form, and what a model is with one merged into its weights.

Writes files with safetensors and json; trains nothing, and needs no PEFT.
Called by: tests. Calls: torch, safetensors.

Shapes: R rank, I values in, O values out.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from reference import Weights
from safetensors.torch import load_file, save_file

ALL_PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""What an adapter of a dense decoder can change in a layer."""


def write_adapter(
    folder: Path,
    weights: Weights,
    layers: Sequence[int],
    projections: Sequence[str] = ALL_PROJECTIONS,
    rank: int = 4,
    alpha: int = 8,
    strength: float = 0.5,
    seed: int = 0,
) -> Path:
    """A random adapter of these layers' projections, for a model with these weights; returns the folder.

    `strength` is the size of the change compared with that of the weights, enough at 0.5 to change most tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        for projection in projections:
            name = f"model.layers.{layer}.{projection}"
            weight_OI = weights[f"{name}.weight"]
            rows, columns = weight_OI.shape
            first_RI = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
            second_OR = torch.randn(rows, rank, generator=generator)
            change_OI = second_OR @ first_RI * (alpha / rank)
            second_OR *= strength * weight_OI.norm() / change_OI.norm()
            tensors[f"base_model.model.{name}.lora_A.weight"] = first_RI
            tensors[f"base_model.model.{name}.lora_B.weight"] = second_OR
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({projection.rpartition(".")[2] for projection in projections}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merge_adapter(weights: Weights, folder: Path) -> Weights:
    """The weights with the adapter's changes added: B @ A * alpha / rank."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    merged = dict(weights)
    for name, first_RI in tensors.items():
        if ".lora_A." not in name:
            continue
        second_OR = tensors[name.replace(".lora_A.", ".lora_B.")]
        target = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
        merged[target] = merged[target] + second_OR @ first_RI * (config["lora_alpha"] / config["r"])
    return merged
