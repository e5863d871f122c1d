"""What a recipe needs to be there before a cluster or a GPU is taken: teacher, cut, text, a free folder.

Called by: cli/distill.py (before the job), distill/loop.py (in it).
"""

from pathlib import Path

from swiftkv.distill.recipe import Recipe
from swiftkv.errors import ConfigError, DataError
from swiftkv.families import find_teacher_family
from swiftkv.model.checkpoint import read_config
from swiftkv.spec import SwiftKVSpec


def check_inputs(recipe: Recipe) -> SwiftKVSpec:
    """The cut that the recipe asks of its teacher, after looking at every input.

    Raises: CheckpointError if the teacher cannot be used; ConfigError if the cut does not fit it; DataError if a
    data file is missing.
    """
    config = read_config(recipe.teacher)
    find_teacher_family(config.get("model_type"))
    num_layers = int(config.get("num_hidden_layers") or 0)
    kept = recipe.cut.num_key_value_layers or -(-num_layers // 2)
    cut = {"num_key_value_layers": kept, "key_value_group_size": recipe.cut.key_value_group_size}
    spec = SwiftKVSpec.from_hf_config(config | cut)
    context = int(config.get("max_position_embeddings") or recipe.data.row_tokens)
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
