"""Quantised copies of tiny SwiftKV checkpoints, made as published ones are: by the compressed-tensors library.

Rounds to the nearest; calibrates nothing. What is quantised is every projection but the LM head, with the scheme of
the published checkpoints: weights per channel (or per tensor), activations per token while the engine runs.
Called by: tests. Calls: compressed-tensors, safetensors, the package's model classes (for the modules' names).
"""

import json
import shutil
from pathlib import Path
from typing import Literal

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams, is_module_quantized
from reference import Weights, load_weights
from safetensors.torch import load_file, save_file

from swiftkv.model.checkpoint import load_student

Tensors = dict[str, torch.Tensor]


def quantise_student(
    folder: Path,
    target: Path,
    kind: Literal["int", "float"] = "int",
    weights: Literal["channel", "tensor"] = "channel",
) -> Path:
    """The student in `folder` with weights in int8 ("int") or FP8 ("float"), written to `target`; returns `target`."""
    model = load_student(folder)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=8, type=kind, strategy=weights, symmetric=True),
        input_activations=QuantizationArgs(num_bits=8, type=kind, strategy="token", symmetric=True, dynamic=True),
    )
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if is_module_quantized(module):
            rows = module.weight.detach() if weights == "channel" else module.weight.detach().reshape(1, -1)
            low, high = rows.amin(dim=-1, keepdim=True), rows.amax(dim=-1, keepdim=True)
            scale, _ = calculate_qparams(low, high, module.quantization_scheme.weights)
            module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    _write(target, folder, tensors)
    compressor.update_config(str(target))
    return target


def add_kv_scales(folder: Path, target: Path, key_scales: list[float], value_scales: list[float]) -> Path:
    """The student in `folder` with an FP8 cache, and a scale of keys and one of values for each layer.

    Weights stay as they are. The scales are in the published place, `self_attn.k_scale` and `v_scale` of a layer;
    of the later layers, only the leaders' are for use. Returns `target`.
    """
    tensors = load_file(folder / "model.safetensors")
    for kind, scales in (("k", key_scales), ("v", value_scales)):
        for layer, scale in enumerate(scales):
            tensors[f"model.layers.{layer}.self_attn.{kind}_scale"] = torch.tensor([scale])
    scheme = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True)
    config = QuantizationConfig(config_groups={}, kv_cache_scheme=scheme, ignore=[], format="float-quantized")
    _write(target, folder, tensors)
    ModelCompressor(quantization_config=config).update_config(str(target))
    return target


def load_dequantised(folder: Path) -> tuple[dict[str, object], Weights]:
    """Config and fp32 weights that a quantised checkpoint stands for: every weight times its scale."""
    config, stored = load_weights(folder)
    scales = {name: stored.pop(name) for name in list(stored) if name.endswith(".weight_scale")}
    for name, scale in scales.items():
        stored[name.removesuffix("_scale")] *= scale
    return config, stored


def count_quantised(folder: Path) -> int:
    """Weights of the folder that take one byte per value."""
    tensors = load_file(folder / "model.safetensors").values()
    return sum(tensor.dtype in (torch.int8, torch.float8_e4m3fn) for tensor in tensors)


def _write(target: Path, source: Path, tensors: Tensors) -> None:
    """A folder with these tensors, and all else as in `source`."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((target / "config.json").read_text())["swiftkv"]
