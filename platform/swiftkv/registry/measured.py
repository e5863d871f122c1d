"""Whether a gate's verdict that arrives with a folder was given on that folder's student, and not on another run's.

One hash of the tensors that distillation made, a twentieth of the bytes. The frozen ones, the teacher's, are not looked
at: this finds verdicts that went astray, not forged ones; who may write to the store can write any verdict.
Called by: registry/registry.py (before publishing), cli/evaluate.py (before and after measuring).
Calls: registry/streaming.py (which files hold weights).
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swiftkv.errors import CheckpointError
from swiftkv.registry.streaming import INDEX_FILE, is_weights

HASH_KEY = "student_sha256"
"""Of an evaluation: what `hash_student` gave for the folder that was measured."""

_READ_BYTES = 1024 * 1024


def hash_student(folder: Path) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the SwiftKV tensors that an engine loads, in whatever files.

    Raises: CheckpointError if a file is no readable safetensors file.
    """
    digest = hashlib.sha256()
    try:
        for name, (path, first, end, about) in sorted(_find_student(folder).items()):
            digest.update(json.dumps([name, about["dtype"], about["shape"]]).encode())
            with path.open("rb") as file:
                file.seek(first)
                for start in range(first, end, _READ_BYTES):
                    wanted = min(_READ_BYTES, end - start)
                    part = file.read(wanted)
                    if len(part) < wanted:
                        raise ValueError(f"{path.name} ends within {name}")
                    digest.update(part)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{folder}: safetensors that cannot be read ({error}). Copy the folder again.") from None
    return digest.hexdigest()


def require_own_gate(folder: Path, evaluation: Mapping[str, Any] | None) -> None:
    """Raises: CheckpointError if an evaluation has a gate's verdict, and was made of another student."""
    if evaluation is None or "gate" not in evaluation:
        return
    if evaluation.get(HASH_KEY) != hash_student(folder):
        raise CheckpointError(
            f"{folder}: the gate's verdict in the provenance is of another student (evaluation.{HASH_KEY} is "
            f"{evaluation.get(HASH_KEY)}). Run `swiftkv evaluate {folder} --gate … --provenance …` again, or take "
            "evaluation.gate out."
        )


def _find_student(folder: Path) -> dict[str, tuple[Path, int, int, dict[str, Any]]]:
    """Name -> file, first byte and end in it, and what its header says."""
    names = {path.name for path in folder.iterdir() if is_weights(path.name) and not path.name.startswith(".")}
    if (folder / INDEX_FILE).is_file():
        names = set(json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values())
    found = {}
    for path in (folder / name for name in sorted(names)):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError(f"{path.name} has no header")
            header = json.loads(file.read(length))
        for name, about in header.items():
            if "swiftkv" in name:
                first, end = (8 + length + offset for offset in about["data_offsets"])
                found[name] = (path, first, end, about)
    return found
