"""Whether a folder is a SwiftKV checkpoint that an engine may load: SwiftKV tensors, a known family, no code.

Reads JSON files and safetensors headers only: no weights, no hashes, nothing is executed.
Called by: registry/registry.py (before every publish, after every download). Calls: spec.
Source: checkpoint format of ArcticTraining's projects/swiftkv (names of tensors and config keys).
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from swiftkv.errors import CheckpointError, ConfigError
from swiftkv.registry.files import find_files
from swiftkv.spec import SwiftKVSpec

PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Formats that run code when they are loaded."""

_CODE_SUFFIXES = (".py", ".pyc", ".so")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_WEIGHT_NAMES = ("weight", "weight_packed")
"""Last part of a projection's tensor name; compressed-tensors packs 4-bit weights under the second."""

_SPEC_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
)
_NAMES_SHOWN = 4


def check_checkpoint(folder: Path, allowed_model_types: Collection[str] | None = None) -> dict[str, Any]:
    """The spec of the checkpoint in `folder`: sizes, architecture, dtype, KV layers and group size.

    `allowed_model_types` None accepts every SwiftKV family.
    Raises: CheckpointError saying what was found, what is allowed and what to change.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Give the folder of a SwiftKV checkpoint.")
    files = find_files(folder)
    config = _load_config(folder)
    _refuse_code(folder, files)
    _check_family(folder, config, allowed_model_types)
    spec = _read_spec(folder, config)
    if not any(name in files for name in _TOKENIZERS):
        raise CheckpointError(
            f"{folder}: no tokenizer. Serving needs {' or '.join(_TOKENIZERS)}: save the teacher's there."
        )
    _check_tensors(folder, _load_tensor_names(folder, files), spec)
    return _describe_spec(config, spec)


def check_without_weights(folder: Path, paths: Collection[str]) -> None:
    """As `check_checkpoint`, of a folder that holds all but the tensors of a version with files at these `paths`."""
    config = _load_config(folder)
    _refuse_code(folder, [path for path in paths if not path.endswith(".safetensors")])
    _check_family(folder, config, None)
    _read_spec(folder, config)


def _load_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no config.json. Give the folder of a Hugging Face checkpoint.")
    return _load_json(path)


def _load_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}). Save the checkpoint again.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}. Save it again.")
    return values


def _refuse_code(folder: Path, files: Collection[str]) -> None:
    pickled = [name for name in files if name.lower().endswith(PICKLED_SUFFIXES)]
    if pickled:
        raise CheckpointError(
            f"{folder}: pickled files ({_join(pickled)}), which run code when they are loaded. Allowed are "
            "weights in safetensors: save the model again with safe_serialization, and remove these."
        )
    code = [name for name in files if name.lower().endswith(_CODE_SUFFIXES)]
    if code:
        raise CheckpointError(f"{folder}: code ({_join(code)}). A checkpoint holds data only: remove these files.")
    for name in files:
        if name.endswith("config.json") and "auto_map" in _load_json(folder / name):
            raise CheckpointError(
                f"{folder / name}: key 'auto_map' asks for code of the checkpoint's own (trust_remote_code), "
                "which is never run. Remove the key, or publish a checkpoint of a family that needs none."
            )


def _check_family(folder: Path, config: dict[str, Any], allowed: Collection[str] | None) -> None:
    model_type = config.get("model_type")
    fits = str(model_type).endswith("_swiftkv") if allowed is None else model_type in allowed
    if not fits:
        names = "those that end in _swiftkv" if allowed is None else ", ".join(sorted(allowed))
        raise CheckpointError(
            f"{folder}: model_type {model_type!r} is not a SwiftKV model. Allowed: {names}. "
            "Distill the model first, or correct config.json."
        )
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or "SwiftKV" not in str(architectures[0]):
        raise CheckpointError(
            f"{folder}: architectures {architectures!r} in config.json. Allowed: a list of one SwiftKV class, "
            'such as ["LlamaSwiftKVForCausalLM"].'
        )


def _read_spec(folder: Path, config: dict[str, Any]) -> SwiftKVSpec:
    if config.get("num_key_value_layers") is None:
        raise CheckpointError(
            f"{folder}: config.json lacks num_key_value_layers, the number of first layers that run for every "
            "token. Add it, or save the student as a SwiftKV model."
        )
    try:
        return SwiftKVSpec.from_hf_config(config)
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: config.json: {error}") from None


def _load_tensor_names(folder: Path, files: Collection[str]) -> set[str]:
    shards = [name for name in files if name.endswith(".safetensors") and "/" not in name]
    if not shards:
        raise CheckpointError(f"{folder}: no *.safetensors file. Save the model's weights in that format.")
    held = {shard: _read_header(folder / shard) for shard in shards}
    for name in files:
        if name.endswith(".safetensors.index.json") and "/" not in name:
            _check_index(folder / name, held)
    return set().union(*held.values())


def _read_header(path: Path) -> set[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}): truncated, or of another format. Copy it again."
        ) from None


def _check_index(path: Path, held: dict[str, set[str]]) -> None:
    weight_map = _load_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path}: no weight_map in it. Save the model again.")
    missing = sorted({str(shard) for shard in weight_map.values()} - held.keys())
    if missing:
        raise CheckpointError(f"{path}: names {_join(missing)}, which the folder lacks. Copy the missing files.")
    absent = sorted(tensor for tensor, shard in weight_map.items() if tensor not in held[shard])
    if absent:
        raise CheckpointError(
            f"{path}: places {_join(absent)} in files that do not hold them. Index and files are of different "
            "saves: save the model again into an empty folder."
        )


def _check_tensors(folder: Path, names: set[str], spec: SwiftKVSpec) -> None:
    missing = [
        f"{module}.weight"
        for module in _list_modules(spec)
        if not any(f"{module}.{suffix}" in names for suffix in _WEIGHT_NAMES)
    ]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} SwiftKV tensors are missing: {_join(missing)}. With num_key_value_layers "
            f"{spec.num_key_value_layers} and key_value_group_size {spec.key_value_group_size} every later layer "
            "has q_proj_swiftkv, and the first of each group k_proj_swiftkv and v_proj_swiftkv. "
            "Distill the model, or correct config.json."
        )


def _list_modules(spec: SwiftKVSpec) -> Iterator[str]:
    yield "model.norm_swiftkv"
    for layer in range(spec.num_key_value_layers, spec.shape.num_hidden_layers):
        yield f"model.layers.{layer}.self_attn.q_proj_swiftkv"
    for layer in spec.leader_layers:
        yield f"model.layers.{layer}.self_attn.k_proj_swiftkv"
        yield f"model.layers.{layer}.self_attn.v_proj_swiftkv"


def _describe_spec(config: dict[str, Any], spec: SwiftKVSpec) -> dict[str, Any]:
    quantization = config.get("quantization_config") or {}
    return {
        "architecture": config["architectures"][0],
        **{key: config[key] for key in _SPEC_KEYS if config.get(key) is not None},
        "num_key_value_heads": spec.shape.num_key_value_heads,
        "head_dim": spec.shape.head_dim,
        "num_key_value_layers": spec.num_key_value_layers,
        "key_value_group_size": spec.key_value_group_size,
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "quantization": quantization.get("quant_method") if isinstance(quantization, dict) else None,
    }


def _join(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
