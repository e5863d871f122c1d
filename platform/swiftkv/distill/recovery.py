"""The newest whole checkpoint of a run whose list of checkpoints was lost.

Ray Train writes its list over the old one; a disk that is full at that moment leaves it empty, beside checkpoints that
are as good as before.
Called by: distill/run.py, distill/worker.py, distill/inputs.py. Calls: pyarrow.
Source: Ray 2.60, train/v2/_internal/execution/checkpoint/checkpoint_manager.py.
"""

import json
import pickle
from pathlib import Path

from pyarrow.fs import FileSelector, FileSystem, FileType

LIST_FILE = "checkpoint_manager_snapshot.json"
_METADATA_FILE = ".metadata"


def open_storage(storage: str) -> tuple[FileSystem, str]:
    """The file system of a folder or bucket, and the path in it. Raises: OSError, ValueError as pyarrow does."""
    system, path = FileSystem.from_uri(storage if "://" in storage else Path(storage).absolute().as_uri())
    return system, str(path)


def recover_checkpoint(storage: str, name: str) -> str | None:
    """Where in `storage` the newest whole checkpoint of the run `name` is, if its list cannot be read; None otherwise.

    The list is removed, so that Ray Train begins another, and so are the other checkpoints, which would be in none.
    """
    system, folder = open_storage(storage)
    folder = f"{folder}/{name}"
    if not _is_list_damaged(system, folder):
        return None
    names = sorted(entry.base_name for entry in system.get_file_info(FileSelector(folder)) if _is_checkpoint(entry))
    whole = [name for name in names if _is_whole(system, f"{folder}/{name}")]
    for other in names:
        if other not in whole[-1:]:
            system.delete_dir(f"{folder}/{other}")
    system.delete_file(f"{folder}/{LIST_FILE}")
    return f"{folder}/{whole[-1]}" if whole else None


def _is_list_damaged(system: FileSystem, folder: str) -> bool:
    path = f"{folder}/{LIST_FILE}"
    if system.get_file_info(path).type != FileType.File:
        return False
    with system.open_input_stream(path) as file:
        content = file.read()
    try:
        json.loads(content)
    except ValueError:
        return True
    return False


def _is_checkpoint(entry: object) -> bool:
    return entry.type == FileType.Directory and entry.base_name.startswith("step-")  # type: ignore[attr-defined]


def _is_whole(system: FileSystem, folder: str) -> bool:
    """Whether every byte that the metadata places in a file is there."""
    try:
        with system.open_input_stream(f"{folder}/{_METADATA_FILE}") as file:
            metadata = pickle.loads(file.read())  # of the run's own storage, which only trusted people can write to
        ends: dict[str, int] = {}
        for place in metadata.storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError):
        return False
    sizes = {path: system.get_file_info(f"{folder}/{path}").size or 0 for path in ends}
    return all(sizes[path] >= end for path, end in ends.items())
