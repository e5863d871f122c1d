"""Reads and writes model folders in Hugging Face form: safetensors only, nothing missing, nothing unknown.

Does not convert (convert.py) and does not check a whole folder for publishing (registry/).
Called by: model/convert.py, distill/loop.py, evaluate/compare.py.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from swiftkv.errors import CheckpointError
from swiftkv.families import FAMILIES
from swiftkv.hf_config import CONFIG_CLASSES, register_config_classes
from swiftkv.model.modeling import MODEL_CLASSES, SwiftKVForCausalLM

Model = TypeVar("Model", bound=PreTrainedModel)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""All that a tokenizer, its chat template included, is made of."""
SIDE_FILES = (*TOKENIZER_FILES, "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
"""Files beside the weights that a student takes over from its teacher: names, and patterns of names."""


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, after refusing folders that cannot be loaded safely.

    Raises: CheckpointError if the folder or its config is missing, or the weights are not safetensors.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Give a Hugging Face model folder.")
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no config.json in it. Give a Hugging Face model folder.")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f"only pickled weights ({', '.join(pickled)})" if pickled else "no weights"
        raise CheckpointError(
            f"{folder}: {found}; only safetensors are loaded, because unpickling runs code. "
            "Save the model with safetensors (transformers: save_pretrained)."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}). Restore the file.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object. Restore the file.")
    return config


def load_tokenizer(folder: Path) -> Any:
    """The folder's own tokenizer.

    Raises: CheckpointError if there is none that transformers can load without running code of the folder.
    """
    register_config_classes()
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{folder}: no tokenizer that can be loaded ({reason}). "
            "Put tokenizer.json and tokenizer_config.json beside the weights."
        ) from None


def load_student(folder: Path, dtype: torch.dtype | None = None) -> SwiftKVForCausalLM:
    """A SwiftKV checkpoint, ours or Snowflake's, with or without the teacher's own later projections.

    `dtype` None takes the checkpoint's.

    Raises: CheckpointError if it is not a SwiftKV checkpoint, or tensors are missing or unknown.
    """
    values = read_config(folder)
    if values.get("model_type") not in FAMILIES:
        raise CheckpointError(
            f"{folder}: model_type is {values.get('model_type')!r}, which is not a SwiftKV checkpoint "
            f"({', '.join(FAMILIES)}). Distill the model first."
        )
    config = CONFIG_CLASSES[values["model_type"]].from_pretrained(folder)
    return load_into(MODEL_CLASSES[config.model_type], config, folder, dtype, may_miss=None)


def save_student(model: SwiftKVForCausalLM, folder: Path, teacher_folder: Path | None = None) -> None:
    """Write the checkpoint in the published format, in one dtype, that of the embeddings.

    Tokenizer and the like are taken from the teacher's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.to(model.model.embed_tokens.weight.dtype)
    model.config.swiftkv = True
    with _quiet_transformers():
        model.save_pretrained(folder)
    _write_older_rope_keys(folder / "config.json")
    if teacher_folder is not None:
        copy_side_files(teacher_folder, folder)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy what lies beside the weights: tokenizer, generation settings, licence."""
    for file in (file for pattern in SIDE_FILES for file in source.glob(pattern) if file.is_file()):
        shutil.copyfile(file, target / file.name)


def load_into(
    model_class: type[Model], config: PreTrainedConfig, folder: Path, dtype: torch.dtype | None, may_miss: str | None
) -> Model:
    """The weights of `folder` in a model of this class.

    `may_miss`: tensors with this in their names may be absent (they are set afterwards).
    Raises: CheckpointError naming what is missing, unknown or of another shape.
    """
    try:
        with _quiet_transformers():
            model, info = model_class.from_pretrained(
                folder,
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: the weights cannot be read ({str(error).splitlines()[0]}). Restore the folder's files."
        ) from None
    missing = sorted(key for key in info["missing_keys"] if may_miss is None or may_miss not in key)
    stripped = _drop_absent_teacher(model, missing)
    problems = {
        "missing": [key for key in missing if key not in stripped],
        "not known": sorted(info["unexpected_keys"]),
        "of another shape": sorted(str(key[0]) for key in info["mismatched_keys"]),
    }
    for what, keys in problems.items():
        if keys:
            shown = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
            raise CheckpointError(f"{folder}: tensors {what}: {shown}. The weights do not belong to config.json.")
    return model


def _write_older_rope_keys(path: Path) -> None:
    """Transformers before 5, which Snowflake's tools use, reads `rope_theta` and `rope_scaling` instead."""
    values = json.loads(path.read_text(encoding="utf-8"))
    rope = dict(values["rope_parameters"])
    values["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type") != "default":
        values["rope_scaling"] = rope
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _drop_absent_teacher(model: PreTrainedModel, missing: list[str]) -> set[str]:
    """Take away the later layers' teacher projections if the checkpoint was stored without any of them."""
    if not isinstance(model, SwiftKVForCausalLM):
        return set()
    teacher_projection = re.compile(r"model\.layers\.(\d+)\.self_attn\.[qkv]_proj\.")
    kept = model.model.spec.num_key_value_layers
    expected = {
        name
        for name, _ in model.named_parameters()
        if (match := teacher_projection.match(name)) and int(match[1]) >= kept
    }
    if not expected or not expected <= set(missing):
        return set()
    for layer in model.model.later_layers:
        layer.self_attn.q_proj = layer.self_attn.k_proj = layer.self_attn.v_proj = None
    return expected


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Transformers prints bars and a table of missing tensors, which `load_into` reports as an error instead."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
