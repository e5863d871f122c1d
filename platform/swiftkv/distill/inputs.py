"""What a recipe needs to be there before a cluster or a GPU is taken: teacher, cut, text, a free folder.

Called by: cli/distill.py (before the job), distill/loop.py (in it).
"""

from pathlib import Path

from swiftkv.distill.recipe import Recipe
from swiftkv.errors import ConfigError, DataError
from swiftkv.model.checkpoint import load_tokenizer, read_config
from swiftkv.model.convert import resolve_cut
from swiftkv.spec import SwiftKVSpec


def check_inputs(recipe: Recipe) -> SwiftKVSpec:
    """The cut that the recipe asks of its teacher, after looking at every input.

    Raises: CheckpointError if the teacher cannot be used; ConfigError if the cut does not fit it; DataError if a
    data file is missing.
    """
    spec = resolve_cut(recipe.teacher, recipe.cut.num_key_value_layers, recipe.cut.key_value_group_size)
    if not spec.num_later_layers:
        raise ConfigError(
            f"cut.num_key_value_layers is {spec.num_key_value_layers}, all of the teacher's layers: nothing would be "
            "skipped or trained. Choose fewer."
        )
    if load_tokenizer(recipe.teacher).eos_token_id is None:
        raise DataError(
            f"{recipe.teacher}: its tokenizer has no end token, which separates documents. "
            "Set eos_token in its tokenizer_config.json."
        )
    context = int(read_config(recipe.teacher).get("max_position_embeddings") or recipe.data.row_tokens)
    if recipe.data.row_tokens > context:
        raise ConfigError(
            f"data.row_tokens is {recipe.data.row_tokens}, but the teacher's context is {context} tokens: "
            "give at most that."
        )
    for file in recipe.data.train:
        if not file.is_file():
            raise DataError(f"{file}: no such file. Check data.train in the recipe.")
    return spec


def check_run_folder(run_folder: Path) -> None:
    """Raises: ConfigError if a run has ended in this folder already."""
    if (run_folder / "final").exists():
        raise ConfigError(f"{run_folder / 'final'} exists: this run has ended already. Choose another --output.")
