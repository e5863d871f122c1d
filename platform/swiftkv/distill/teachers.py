"""A teacher that is a folder here or a model of the Hugging Face hub: its cut without weights, or its folder.

Does not convert or load weights (model/).
Called by: cli/distill.py, cli/delta.py, distill/run.py.
Calls: hub; model/convert.py for folders.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swiftkv.distill.recipe import Recipe
from swiftkv.errors import CheckpointError, ConfigError
from swiftkv.families import find_teacher_family
from swiftkv.hub import download_config, find_model_folder
from swiftkv.spec import SwiftKVSpec


def _describe_shape(
    model_type: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, context: int
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


KNOWN_TEACHERS: Mapping[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B-Instruct": _describe_shape("llama", 32, 4096, 14336, 32, 8, 128256, 131072),
    "meta-llama/Llama-3.3-70B-Instruct": _describe_shape("llama", 80, 8192, 28672, 64, 8, 128256, 131072),
    "Qwen/Qwen2.5-7B-Instruct": _describe_shape("qwen2", 28, 3584, 18944, 28, 4, 152064, 32768),
    "Qwen/Qwen3-8B": _describe_shape("qwen3", 36, 4096, 12288, 32, 8, 151936, 40960),
    "mistralai/Mistral-7B-Instruct-v0.3": _describe_shape("mistral", 32, 4096, 14336, 32, 8, 32768, 32768),
}
"""What the config.json of the shipped recipes' teachers says of their shapes: for estimates without a network."""


def load_teacher_spec(recipe: Recipe, config: Mapping[str, Any] | None = None) -> SwiftKVSpec:
    """What the recipe makes of its teacher, from the config.json of a folder or of the hub; loads no weights.

    `config`: what `load_teacher_config` gave, if it was asked before.
    Raises: CheckpointError for a teacher that is not found, or of no known family; ConfigError for a cut or rows that
    do not fit it.
    """
    cut = recipe.cut
    if recipe.teacher.is_dir():
        from swiftkv.model.checkpoint import read_config  # torch is needed for folders only
        from swiftkv.model.convert import resolve_cut

        _check_fit(recipe, read_config(recipe.teacher))
        return resolve_cut(recipe.teacher, cut.num_key_value_layers, cut.key_value_group_size)
    config = load_teacher_config(recipe.teacher) if config is None else config
    find_teacher_family(config.get("model_type"))
    _check_fit(recipe, config)
    kept = cut.num_key_value_layers or -(-int(config.get("num_hidden_layers") or 0) // 2)
    chosen = {"num_key_value_layers": kept, "key_value_group_size": cut.key_value_group_size}
    return SwiftKVSpec.from_hf_config({**config, **chosen})


def _check_fit(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Raises: ConfigError for a cut that leaves nothing to train, or rows that do not fit teacher or workers."""
    layers = int(config.get("num_hidden_layers") or 0)
    kept = recipe.cut.num_key_value_layers or -(-layers // 2)
    if 0 < layers <= kept:
        raise ConfigError(
            f"cut.num_key_value_layers is {kept}, and the teacher has {layers} layers: nothing would be skipped or "
            f"trained. Choose fewer than {layers}; {-(-layers // 2)}, half of them, is usual."
        )
    row_tokens, rows_per_step = recipe.data.row_tokens, recipe.training.rows_per_step
    context = int(config.get("max_position_embeddings") or row_tokens)
    if row_tokens > context:
        raise ConfigError(
            f"data.row_tokens is {row_tokens}, but the teacher's context is {context} tokens: give at most that."
        )
    if rows_per_step < recipe.workers.num_workers:
        raise ConfigError(
            f"training.rows_per_step is {rows_per_step}, fewer than workers.num_workers "
            f"({recipe.workers.num_workers}): some workers would have nothing to do. Give at least a row for each."
        )


def load_teacher_config(teacher: Path) -> dict[str, Any]:
    """The teacher's config.json: from its folder, the hub's cache, the hub, or the table of known teachers.

    The table, of the shipped recipes' teachers, works without a network; that it was used is logged as a warning.
    Raises: CheckpointError if it is nowhere.
    """
    if teacher.is_dir():
        return _read_json(teacher / "config.json")
    try:
        return _read_json(download_config(teacher))
    except CheckpointError:
        known = KNOWN_TEACHERS.get(teacher.as_posix())
        if known is None:
            raise
        told = "%s: the hub gave no config.json; the shape is taken from a table of known teachers."
        logging.getLogger(__name__).warning(told, teacher)
        return dict(known)


def count_weight_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of one weight of a teacher with this config.json: 4 for float32, otherwise 2."""
    return 4 if (config.get("dtype") or config.get("torch_dtype") or "float32") == "float32" else 2


def resolve_teacher(teacher: Path, revision: str | None = None) -> Path:
    """The teacher's folder here; one of the hub is downloaded first (safetensors, JSON and tokenizer files).

    Raises: CheckpointError if it is neither a folder nor a model of the hub, if the hub cannot be reached or refuses,
    or if it is of no known family, which is found before its weights are downloaded.
    """
    if not teacher.is_dir():
        find_teacher_family(_read_json(download_config(teacher, revision)).get("model_type"))
    return find_model_folder(teacher, revision)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). Restore the teacher's files.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object. Restore the teacher's files.")
    return values
