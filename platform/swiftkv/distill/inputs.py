"""What a recipe needs to be there before a cluster or a GPU is taken: teacher, cut and documents.

Looks at the first few documents of files only. Data sets of the hub are not asked for here, because that needs a
network and may download much: prepare.py reads them, before workers start.
Called by: cli/distill.py (before the job), distill/run.py (in it).
"""

import importlib.util
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from swiftkv.distill.recipe import Recipe, SourceSettings
from swiftkv.distill.sources import Document, load_source
from swiftkv.distill.teachers import load_teacher_spec
from swiftkv.distill.tokenise import check_tokenizer, tokenise_documents
from swiftkv.errors import ConfigError, DataError
from swiftkv.model.checkpoint import load_tokenizer, read_config
from swiftkv.spec import SwiftKVSpec

_NUM_FIRST_DOCUMENTS = 16
_FIRST_CHARACTERS = 10_000


def check_inputs(recipe: Recipe) -> SwiftKVSpec:
    """The cut that the recipe asks of its teacher, after looking at every input.

    Raises: CheckpointError if the teacher cannot be used; ConfigError if the cut, the rows or the tokenizer do not fit
    it; DataError if documents are missing or cannot be used.
    """
    spec = load_teacher_spec(recipe)
    tokenizer = load_tokenizer(recipe.teacher)
    _check_vocabulary(recipe.teacher, tokenizer)
    if recipe.report.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "report.wandb_project is set, but wandb is not installed. pip install wandb, or leave it out."
        )
    for source in recipe.data.train:
        check_tokenizer(tokenizer, source.format)
        if source.name is None:
            _check_first_documents(source, tokenizer, recipe.data.loss_on)
    return spec


def check_storage(storage: str) -> None:
    """Raises: ConfigError if nothing can be written to this folder or bucket."""
    from swiftkv.distill.recovery import open_storage

    try:
        system, path = open_storage(storage)
        system.create_dir(path, recursive=True)
        with system.open_output_stream(f"{path}/.written") as probe:
            probe.write(b"")
        system.delete_file(f"{path}/.written")
    except (OSError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{storage}: checkpoints cannot be stored there ({reason}). Check checkpoints.storage, its credentials and "
            "the network."
        ) from None


def _check_vocabulary(teacher: Path, tokenizer: Any) -> None:
    num_embeddings = int(read_config(teacher)["vocab_size"])
    largest = max(tokenizer.get_vocab().values())
    if largest >= num_embeddings:
        raise ConfigError(
            f"{teacher}: mixed vocabularies: its tokenizer has token ids up to {largest}, but the model embeds only "
            f"{num_embeddings} tokens. Put the tokenizer that belongs to the model beside its weights."
        )


def _check_first_documents(settings: SourceSettings, tokenizer: Any, loss_on: str) -> None:
    source = load_source(settings)
    documents = [_shorten(document) for document in islice(source.read(), _NUM_FIRST_DOCUMENTS)]
    examples = tokenise_documents(tokenizer, documents, settings.format, loss_on)
    if not any(example.predicts.any() for example in examples):
        if problem := next((example.problem for example in examples if example.problem), ""):
            raise DataError(problem)
        raise DataError(
            f"{source.place}: all masked: none of the first {len(documents)} documents has an answer, and only answers "
            "carry a loss. Give messages of the role assistant, or set data.loss_on to all."
        )


def _shorten(document: Document) -> Document:
    """A text file may be a whole book, whose first pages will do."""
    is_text = isinstance(document.content, str)
    return replace(document, content=document.content[:_FIRST_CHARACTERS]) if is_text else document
