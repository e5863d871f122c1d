"""Documents of a data set of the Hugging Face hub, or of files, read with `datasets` and checked one by one.

Does not tokenise them (tokenise.py). Files are read as they are; what `datasets` makes of downloads is kept under
`swiftkv.config.home()`, unless HF_HOME or HF_DATASETS_CACHE says where.
Called by: distill/inputs.py (the first few), distill/prepare.py (all of them).
"""

import glob
import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from swiftkv.config import home
from swiftkv.distill.recipe import SourceSettings
from swiftkv.errors import DataError

Message = dict[str, str]
"""`role` and `content`."""

_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
"""End of a file's name -> what `datasets` calls it."""
_ROLES = {"human": "user", "gpt": "assistant"}
"""Other names of roles, as in messages with `from` and `value`."""
_DOCUMENTS_PER_READ = 32
_READ_ERRORS = (ValueError, TypeError, NotImplementedError, OSError, datasets.exceptions.DatasetsError)
"""What `datasets` and Arrow raise for data that they cannot read."""


@dataclass(frozen=True)
class Document:
    """One document, whatever columns it came from."""

    place: str
    """Where it is, for error messages."""
    content: Any
    """Of the format text: the text. pair: [prompt, response]. chat: a list of messages."""


@dataclass(frozen=True)
class Source:
    """A source that was found and can be read."""

    settings: SourceSettings
    place: str
    """Name or files, for error messages."""
    rows: Any
    """`datasets`' own data set: of the hub on disk, of files read as it goes."""

    def read(self) -> Iterator[Document]:
        """The documents in order, at most `max_documents`.

        Raises: DataError naming the document, or the file and line, and what to change.
        """
        return islice(self._read_all(), self.settings.max_documents)

    def compute_hash(self) -> str:
        """Changes when the documents do: SHA-256 of the files, or what the hub's revision is known by."""
        if self.settings.name is not None:
            return str(self.rows._fingerprint)
        digest = hashlib.sha256(_find_kind(self.settings.files).encode())
        for path in self.settings.files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _read_all(self) -> Iterator[Document]:
        number = 0
        for columns in self._read_columns():
            for values in zip(*columns, strict=True):
                number += 1
                place = f"{self.place}, document {number}"
                yield Document(place, _check_content(self.settings, list(values), place))
        if not number:
            raise DataError(f"{self.place}: no documents. Give data that is not empty.")

    def _read_columns(self) -> Iterator[list[list[Any]]]:
        """The values of the format's columns, some documents at a time."""
        names = list(_find_columns(self.settings).values())
        batches = self.rows.iter(batch_size=_DOCUMENTS_PER_READ)
        while True:
            try:
                with _quiet_datasets():
                    batch = next(batches, None)
            except _READ_ERRORS as error:
                raise _describe_unreadable(self.settings, self.place, error) from None
            if batch is None:
                return
            _check_columns(self.settings, self.place, list(batch))
            yield [batch[name] for name in names]


def load_source(settings: SourceSettings) -> Source:
    """Find a source; a data set of the hub is downloaded unless it is there already.

    Raises: DataError if a file is missing, of an unknown kind or malformed, the hub cannot be reached, or the hub has
    no such data set.
    """
    if settings.name is not None:
        return Source(settings, settings.name, _load_from_hub(settings))
    kind = _find_kind(settings.files)
    place = str(settings.files[0]) + (f" and {len(settings.files) - 1} more" if len(settings.files) > 1 else "")
    options: Any = {"text": {"sample_by": "document"}, "json": {"parse_agent_traces": False}}.get(kind, {})
    names = [glob.escape(str(file.absolute())) for file in settings.files]  # `datasets` takes them for patterns
    try:
        with _quiet_datasets():
            rows = datasets.load_dataset(
                kind, data_files={"train": names}, split="train", streaming=True, cache_dir=_find_cache(), **options
            )
    except StopIteration:  # datasets 5.2, of JSON files that are all empty
        raise DataError(f"{place}: no documents. Give data that is not empty.") from None
    except _READ_ERRORS as error:
        raise _describe_unreadable(settings, place, error) from None
    return Source(settings, place, rows)


def _load_from_hub(settings: SourceSettings) -> Any:
    try:
        with _quiet_datasets():
            return datasets.load_dataset(settings.name, settings.subset, split=settings.split, cache_dir=_find_cache())
    except ConnectionError as error:
        raise DataError(
            f"{settings.name}: the Hugging Face hub cannot be reached ({_first_line(error)}), and the data set is not "
            "in the cache. Connect this machine, or download the data elsewhere and give its files as `files`."
        ) from None
    except (*_READ_ERRORS, RuntimeError) as error:
        raise DataError(
            f"{settings.name}: cannot be loaded from the Hugging Face hub ({_first_line(error)}). "
            "Check name, subset and split of the source."
        ) from None


def _find_kind(files: list[Path]) -> str:
    """What `datasets` calls the files' kind, by the ends of their names."""
    kinds = {}
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: no such file. Check `files` under data.train.")
        suffix = Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
        if suffix not in _KINDS or (file.suffix == ".gz" and suffix == ".parquet"):
            allowed = ", ".join(_KINDS)
            raise DataError(f"{file}: what it holds is told by the end of its name. Use {allowed} (or .jsonl.gz).")
        kinds[_KINDS[suffix]] = file
    if len(kinds) > 1:
        names = " and ".join(str(file) for file in kinds.values())
        raise DataError(f"{names} are of different kinds. Give each kind as a source of its own.")
    return next(iter(kinds))


def _find_cache() -> str | None:
    """Folder of `datasets`; None leaves it where the user has set it."""
    is_set = os.environ.get("HF_HOME") or os.environ.get("HF_DATASETS_CACHE")
    return None if is_set else str(home() / "cache" / "datasets")


def _find_columns(settings: SourceSettings) -> dict[str, str]:
    """Setting -> column, for the format's columns."""
    names = {"text": ["text_column"], "chat": ["messages_column"], "pair": ["prompt_column", "response_column"]}
    return {name: getattr(settings, name) for name in names[settings.format]}


def _check_columns(settings: SourceSettings, place: str, there: list[str]) -> None:
    for setting, column in _find_columns(settings).items():
        if column not in there:
            raise DataError(
                f"{place}: no column {column!r}; there are: {', '.join(there)}. Set {setting} of this source "
                f"(its format is {settings.format})."
            )


def _check_content(settings: SourceSettings, values: list[Any], place: str) -> Any:
    columns = _find_columns(settings).values()
    if settings.format == "chat":
        return _check_messages(values[0], f"{place}: column {settings.messages_column!r}")
    for column, value in zip(columns, values, strict=True):
        if not isinstance(value, str):
            raise DataError(f"{place}: column {column!r} holds {_name_type(value)}; give text.")
    return values[0] if settings.format == "text" else values


def _check_messages(messages: Any, place: str) -> list[Message]:
    """The messages as `role` and `content`."""
    if not isinstance(messages, list) or not messages:
        found = "no message" if messages == [] else _name_type(messages)
        raise DataError(f"{place} holds {found}; give a list of messages.")
    return [_check_message(message, place) for message in messages]


def _check_message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{place} has a message that is {_name_type(message)}; give role and content.")
    given = {key: value for key, value in message.items() if value is not None}
    role, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(
            f"{place} has a message with {', '.join(given) or 'nothing'}; give role and content (or from and value), "
            "both text."
        )
    return {"role": _ROLES.get(role, role), "content": content}


def _name_type(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _describe_unreadable(settings: SourceSettings, place: str, error: Exception) -> DataError:
    """The malformed line if there is one, else what the reader said."""
    for file in settings.files:
        if _KINDS[Path(file.name.removesuffix(".gz")).suffix] == "json" and (fault := _find_malformed_line(file)):
            return DataError(f"{fault}. Give one JSON object per line.")
    return DataError(f"{place}: cannot be read ({_first_line(error)}). Restore the data.")


def _find_malformed_line(file: Path) -> str | None:
    opened = gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")
    with opened as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1 and line.lstrip().startswith(b"["):  # one list over the whole file
                return None
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"{file}:{number}: not a JSON object"
            except ValueError as fault:
                return f"{file}:{number}: not valid JSON ({fault})"
    return None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """`datasets` shows bars and logs what it raises as well."""
    level, had_bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not had_bars:
            datasets.enable_progress_bars()
