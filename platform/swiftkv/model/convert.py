"""Turns a teacher into a student that has not been distilled yet, and says which parameters are trained.

Does not train. Initialisation: queries copied; keys and values averaged over the layers of the group; the new
norm copied from the first later layer's.
Called by: distill/loop.py, tests.
Source: fact sheet of SwiftKV, section 1.2.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from swiftkv.errors import CheckpointError
from swiftkv.families import Family, find_teacher_family
from swiftkv.hf_config import CONFIG_CLASSES
from swiftkv.model.checkpoint import load_into, read_config
from swiftkv.model.modeling import MODEL_CLASSES, SwiftKVForCausalLM
from swiftkv.spec import SwiftKVSpec


def resolve_cut(folder: Path, num_key_value_layers: int | None, key_value_group_size: int = 1) -> SwiftKVSpec:
    """What the teacher in `folder` becomes with this cut; None keeps half of its layers. Reads config.json only.

    Raises: CheckpointError if the folder is missing, not of a known family, holds pickled weights or cannot be served;
    ConfigError if the cut or the group size does not fit the teacher.
    """
    config = read_config(folder)
    family = find_teacher_family(config.get("model_type"))
    if "quantization_config" in config:
        raise CheckpointError(f"{folder}: the teacher is quantised. Distill from its unquantised weights.")
    if "auto_map" in config:
        raise CheckpointError(f"{folder}: config.json names code of its own (auto_map), which is never run. Remove it.")
    kept = num_key_value_layers or -(-int(config.get("num_hidden_layers") or 0) // 2)
    cut = {"num_key_value_layers": kept, "key_value_group_size": key_value_group_size}
    spec = SwiftKVSpec.from_hf_config(config | cut)
    family.verify(_build_config(family, config, spec))
    return spec


def convert_teacher(
    folder: Path,
    num_key_value_layers: int | None,
    key_value_group_size: int = 1,
    dtype: torch.dtype | None = None,
) -> SwiftKVForCausalLM:
    """The teacher in `folder` with untrained student projections beside its own; None takes the teacher's dtype.

    Raises: what `resolve_cut` raises; CheckpointError if the weights do not belong to the config.
    """
    spec = resolve_cut(folder, num_key_value_layers, key_value_group_size)
    teacher_config = read_config(folder)
    family = find_teacher_family(teacher_config.get("model_type"))
    config = _build_config(family, teacher_config, spec)
    model = load_into(MODEL_CLASSES[family.model_type], config, folder, dtype, may_miss="swiftkv")
    initialise_student(model)
    return model


@torch.no_grad()
def initialise_student(model: SwiftKVForCausalLM) -> None:
    """Set the student's projections and norm from the teacher's."""
    spec, layers = model.model.spec, model.model.later_layers
    if not layers:
        return
    model.model.norm_swiftkv.load_state_dict(layers[0].input_layernorm.state_dict())
    for layer in layers:
        layer.self_attn.q_proj_swiftkv.load_state_dict(layer.self_attn.q_proj.state_dict())
    for first in range(0, len(layers), spec.key_value_group_size):
        group = [layer.self_attn for layer in layers[first : first + spec.key_value_group_size]]
        _copy_mean(group[0].k_proj_swiftkv, [attention.k_proj for attention in group])
        _copy_mean(group[0].v_proj_swiftkv, [attention.v_proj for attention in group])


def freeze_teacher(model: nn.Module) -> list[nn.Parameter]:
    """Let gradients reach only the student's projections and norm; returns these, in a fixed order.

    They become float32, because the optimizer's small steps are lost in bfloat16; what is frozen stays as it is.
    """
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("swiftkv" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            trained.append(parameter)
    return trained


def _build_config(family: Family, teacher_config: dict[str, Any], spec: SwiftKVSpec) -> PreTrainedConfig:
    """The student's config: the teacher's with another name and the cut."""
    values = {key: value for key, value in teacher_config.items() if key not in ("architectures", "model_type")}
    cut = {name: getattr(spec, name) for name in ("num_key_value_layers", "key_value_group_size")}
    config = CONFIG_CLASSES[family.model_type](**values | cut)
    config.architectures = [family.architecture]
    return config


def _copy_mean(target: nn.Module, sources: list[nn.Module]) -> None:
    for name, parameter in target.named_parameters():
        stacked = torch.stack([source.get_parameter(name) for source in sources])
        parameter.copy_(stacked.float().mean(0).to(parameter.dtype))
