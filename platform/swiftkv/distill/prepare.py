"""Prepares a recipe's rows before the workers start: tokenised by Ray Data, packed, and kept for the next run.

Does not read them back (data.py). A folder of rows is named after all that it was made of, and appears whole or not
at all. Ray Data holds CPUs only while it runs: workers that held all of them would leave it waiting for ever.
Called by: distill/run.py.
Calls: sources.py, tokenise.py, packing.py, data.py.
"""

import errno
import hashlib
import json
import logging
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import ray.data
from ray.exceptions import RayTaskError

from swiftkv.distill.data import INFO_FILE, RowWriter
from swiftkv.distill.packing import Counts, RowBlock, fit_examples, pack_examples
from swiftkv.distill.recipe import Recipe, SourceSettings
from swiftkv.distill.sources import Document, Source, load_source
from swiftkv.distill.tokenise import Example, tokenise_documents
from swiftkv.errors import DataError, TrainingError
from swiftkv.model.checkpoint import TOKENIZER_FILES, load_tokenizer

_FORMAT = 1
"""Of the rows: raise it when the same input gives other rows than before."""
_CHARACTERS_PER_TASK = 1 << 20
"""About a second of work."""
_TASKS_PER_RUN = 256
"""Handed to Ray Data at once: what its object store holds of the documents."""
_REPORT_EVERY_S = 5.0
_LEFTOVER_AFTER_S = 24 * 3600.0
"""A half-made folder that nobody has written to for so long was left by a run that was killed."""


def prepare_rows(recipe: Recipe, cache: Path) -> Path:
    """The folder of the recipe's rows in `cache`, made now unless it is there. Prints which of the two.

    Needs a Ray cluster if it is made (`ray.init()` decides which). The rows depend on the recipe and its inputs alone,
    not on the cluster's size.
    Raises: DataError for documents that cannot be used, or if none of them carries a loss.
    """
    sources = [_load_source(settings) for settings in recipe.data.train]
    hashes = [source.compute_hash() for source in sources]
    fingerprint = _compute_fingerprint(recipe, hashes)
    folder = cache / fingerprint
    if (folder / INFO_FILE).is_file():
        info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
        print(f"rows: {info['rows']:,} of {recipe.data.row_tokens} tokens, prepared before ({folder})", flush=True)
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(cache)
    with _create_whole(folder) as unfinished:
        info = _write_rows(recipe, sources, hashes, unfinished)
    print(
        f"rows: {info['rows']:,} of {recipe.data.row_tokens} tokens from {info['documents']:,} documents, "
        f"{info['used_frac']:.1%} of them used",
        flush=True,
    )
    return folder


def _load_source(settings: SourceSettings) -> Source:
    if settings.name is not None:
        print(f"rows: looking up {settings.name}, which may have to be downloaded", flush=True)
    return load_source(settings)


def _compute_fingerprint(recipe: Recipe, hashes: list[str]) -> str:
    """SHA-256 over tokenizer, documents and settings. Files count by what is in them, wherever they lie."""
    settings = recipe.data.model_dump(mode="json", exclude={"train": {"__all__": {"files", "name"}}})
    parts = [_FORMAT, settings, hashes, _hash_tokenizer(recipe.teacher)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _hash_tokenizer(teacher: Path) -> str:
    digest = hashlib.sha256()
    for path in (teacher / name for name in TOKENIZER_FILES):
        digest.update(hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"-")
    return digest.hexdigest()


def _write_rows(recipe: Recipe, sources: list[Source], hashes: list[str], folder: Path) -> dict[str, Any]:
    """Make the rows; returns what is written beside them."""
    data, counts = recipe.data, Counts()
    tokenizer = load_tokenizer(recipe.teacher)
    examples = (example for source in sources for example in _fit_source(recipe, source, counts))
    writer = RowWriter(folder, data.row_tokens)
    for block in _report(pack_examples(examples, data.row_tokens, tokenizer.eos_token_id, data.packing), counts):
        writer.write(block)
    _check_counts(counts, writer.num_positions, data.row_tokens)
    info = {
        "settings": data.model_dump(mode="json"),
        "sources": [{"place": source.place, "hash": digest} for source, digest in zip(sources, hashes, strict=True)],
        **asdict(counts),
        "rows": writer.num_rows,
        "used_frac": counts.tokens / (writer.num_rows * data.row_tokens),
        "positions_with_loss": writer.num_positions,
    }
    writer.close(info)
    return info


def _check_counts(counts: Counts, num_positions: int, row_tokens: int) -> None:
    """Tells what was lost. Raises: DataError if that is everything."""
    if not num_positions:
        raise DataError(
            f"all masked: of {counts.documents:,} documents none carries a loss within data.row_tokens ({row_tokens}); "
            f"{counts.left_out:,} are longer, {counts.without_loss:,} have no answer. Raise data.row_tokens, or give "
            f"documents with answers. {counts.first_problem}".rstrip()
        )
    if counts.cut or counts.left_out:
        print(f"rows: {counts.cut:,} examples cut, {counts.left_out:,} left out: raise data.row_tokens", flush=True)
    if counts.without_loss:
        print(f"rows: {counts.without_loss:,} examples without an answer left out", flush=True)
    if counts.refused:
        print(f"rows: {counts.refused:,} conversations left out; the first: {counts.first_problem}", flush=True)


def _fit_source(recipe: Recipe, source: Source, counts: Counts) -> Iterator[Example]:
    examples = _tokenise_source(recipe, source, counts)
    return fit_examples(examples, recipe.data.row_tokens, source.settings.format == "text", counts)


def _tokenise_source(recipe: Recipe, source: Source, counts: Counts) -> Iterator[Example]:
    """Examples in the order of the documents, whichever worker made them."""
    settings = {
        "teacher": recipe.teacher.absolute(),
        "tokenizer_hash": _hash_tokenizer(recipe.teacher),
        "kind": source.settings.format,
        "loss_on": recipe.data.loss_on,
    }
    for tasks in _batch(_batch(source.read(), _CHARACTERS_PER_TASK, _count_characters), _TASKS_PER_RUN):
        counts.documents += sum(map(len, tasks))
        yield from _tokenise_on_cluster([pickle.dumps(documents) for documents in tasks], settings)


def _tokenise_on_cluster(tasks: list[bytes], settings: dict[str, Any]) -> Iterator[Example]:
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = context.print_on_execution_start = False
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # each run's start and end; errors are raised
    with ray.data.DataContext.current(context):
        rows = ray.data.from_items([{"documents": task} for task in tasks], override_num_blocks=len(tasks))
        try:
            for row in rows.map(_tokenise_task, fn_kwargs=settings).iter_rows():
                yield from pickle.loads(row["examples"])
        except RayTaskError as error:
            if isinstance(error.cause, DataError):
                raise error.cause from None
            raise


def _tokenise_task(
    row: dict[str, bytes], teacher: Path, tokenizer_hash: str, kind: Any, loss_on: str
) -> dict[str, bytes]:
    documents: list[Document] = pickle.loads(row["documents"])
    tokenizer = _load_tokenizer_once(teacher, tokenizer_hash)
    return {"examples": pickle.dumps(tokenise_documents(tokenizer, documents, kind, loss_on))}


@cache
def _load_tokenizer_once(teacher: Path, tokenizer_hash: str) -> Any:
    """The hash is there for the cache: a folder may be given another tokenizer while its processes live."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every CPU has a task of its own
    return load_tokenizer(teacher)


def _count_characters(document: Document) -> int:
    return len(str(document.content))


def _batch(items: Iterable[Any], limit: int, measure: Any = lambda item: 1) -> Iterator[list[Any]]:
    """Lists of items that together measure `limit`, or just over it."""
    batch, measured = [], 0
    for item in items:
        batch.append(item)
        measured += measure(item)
        if measured >= limit:
            yield batch
            batch, measured = [], 0
    if batch:
        yield batch


def _report(blocks: Iterable[RowBlock], counts: Counts) -> Iterator[RowBlock]:
    """The blocks, with a line every few seconds of long work."""
    last = time.monotonic()
    for block in blocks:
        if time.monotonic() - last > _REPORT_EVERY_S:
            last = time.monotonic()
            print(f"rows: {counts.documents:,} documents, {counts.tokens:,} tokens so far", flush=True)
        yield block


@contextmanager
def _create_whole(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its name at the end; one that is there by then stays."""
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:
            if not (folder / INFO_FILE).is_file():  # else another run made the same rows first
                raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TrainingError(
            f"{folder.parent}: the rows do not fit on its disk ({error.strerror}). Free some space, or set "
            "SWIFTKV_HOME to a folder on another disk."
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _remove_leftovers(cache: Path) -> None:
    for unfinished in cache.glob(".unfinished-*"):
        written = [path.stat().st_mtime for path in (unfinished, *unfinished.iterdir())]
        if time.time() - max(written) > _LEFTOVER_AFTER_S:
            shutil.rmtree(unfinished, ignore_errors=True)
