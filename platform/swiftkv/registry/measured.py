"""Whether figures that arrive with a folder were measured of that folder's student: a verdict may not stray to others.

One hash of the tensors that distillation made, which are a twentieth of the bytes; their teacher is named beside them.
Called by: registry/registry.py (before publishing), cli/evaluate.py (after measuring).
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swiftkv.errors import CheckpointError

HASH_KEY = "student_sha256"
"""Of an evaluation: what `hash_student` gave for the folder that was measured."""

_READ_BYTES = 1024 * 1024


def hash_student(folder: Path) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the SwiftKV tensors, in whatever files they are.

    Raises: CheckpointError if a file is no readable safetensors file.
    """
    places: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        start, header = _read_header(path)
        places |= {name: (path, start, about) for name, about in header.items() if "swiftkv" in name}
    digest = hashlib.sha256()
    for name, (path, start, about) in sorted(places.items()):
        digest.update(json.dumps([name, about["dtype"], about["shape"]]).encode())
        first, end = about["data_offsets"]
        with path.open("rb") as file:
            file.seek(start + first)
            left = end - first
            while left and (part := file.read(min(_READ_BYTES, left))):
                digest.update(part)
                left -= len(part)
    return digest.hexdigest()


def require_own_gate(folder: Path, evaluation: Mapping[str, Any] | None) -> None:
    """Raises: CheckpointError if an evaluation has a gate's verdict and was made of other tensors than the folder's."""
    if evaluation is None or "gate" not in evaluation:
        return
    if evaluation.get(HASH_KEY) != hash_student(folder):
        raise CheckpointError(
            f"{folder}: the gate's verdict in the provenance is of another student (evaluation.{HASH_KEY} is "
            f"{evaluation.get(HASH_KEY)}). Run `swiftkv evaluate {folder} --gate … --provenance …` again, or take "
            "evaluation.gate out."
        )


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors' bytes begin, and what is said of each tensor."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return 8 + length, header
    except (ValueError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}). Copy it again.") from None
