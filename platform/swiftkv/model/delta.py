"""A student stored as only the tensors that distillation made, beside a reference to its base; and read back whole.

By `spec`, the delta of Llama-3.1-8B with half its layers skipped is 0.8 GB of bfloat16, and the whole checkpoint
16.9 GB. Also writes the layout that Snowflake's tools read. Downloads nothing and publishes nothing.
Called by: cli/delta.py. Calls: model/checkpoint.py, safetensors.

    delta.json         which base, with the SHA-256 of its config.json and of each of its safetensors files
    delta.safetensors  the new tensors
    config.json, tokenizer.json, …  as the whole checkpoint has them
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from swiftkv.config import StrictModel, load_yaml
from swiftkv.errors import CheckpointError, IntegrityError
from swiftkv.families import FAMILIES
from swiftkv.model.checkpoint import copy_side_files, load_student, read_config, save_student
from swiftkv.model.modeling import SwiftKVForCausalLM

RECORD_FILE, TENSORS_FILE, _INDEX_FILE = "delta.json", "delta.safetensors", "model.safetensors.index.json"
SNOWFLAKE_MODEL_TYPES = ("llama_swiftkv", "qwen2_swiftkv")
"""Of the families in our table, those that Snowflake's training and serving code has classes for."""


@dataclass(frozen=True)
class Base:
    """The teacher that a delta is the difference to."""

    folder: Path
    """Where it lies here."""
    name: str
    """What delta.json calls it: a model of the Hugging Face hub, or the folder."""
    revision: str | None = None
    """Commit of the hub's model."""

    @classmethod
    def from_folder(cls, folder: Path) -> "Base":
        """The base in `folder`; in the hub's cache, by the name and commit that its path holds."""
        folder = folder.absolute()
        repository = folder.parent.parent.name
        if folder.parent.name == "snapshots" and repository.startswith("models--"):
            return cls(folder, repository.removeprefix("models--").replace("--", "/"), folder.name)
        return cls(folder, str(folder))


class DeltaRecord(StrictModel):
    """What delta.json says."""

    format: Literal[1] = 1
    base_name: str
    """Hub name or folder."""
    base_revision: str | None
    """Commit on the hub; None for a folder."""
    base_sha256: dict[str, str]
    """Of the base's config.json and safetensors files."""


def save_delta(student: Path | SwiftKVForCausalLM, folder: Path, base: Base) -> None:
    """Write the student's own tensors and what is needed to have the whole checkpoint back from the base.

    A model is written whole for a moment (`save_student`, which gives it one dtype). Every other tensor is compared
    with the base's, one at a time.
    Raises: CheckpointError if the student is not one, is not of this base, or the folder exists.
    """
    if isinstance(student, Path):
        _save_delta(student, folder, base)
        return
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent) as whole:
        save_student(student, Path(whole), base.folder)
        _save_delta(Path(whole), folder, base)


def load_delta_record(folder: Path) -> DeltaRecord:
    """Which base the delta in `folder` needs.

    Raises: CheckpointError if the folder holds no delta; ConfigError if its delta.json is damaged.
    """
    if not (folder / RECORD_FILE).is_file() or not (folder / TENSORS_FILE).is_file():
        raise CheckpointError(f"{folder}: no {RECORD_FILE} and {TENSORS_FILE} in it. Give a folder of `delta save`.")
    return load_yaml(folder / RECORD_FILE, DeltaRecord)


def restore_delta(folder: Path, base_folder: Path, target: Path, links: bool = False) -> dict[str, str]:
    """Write the whole checkpoint, with tensors bit-identical to those that the delta was made of.

    The base's files become hard links where the disk allows it, and are copied elsewhere; nothing is loaded. `links`
    makes them symbolic links, as for a folder that is only published. The teacher's own projections are always there,
    also if the delta was made of a checkpoint without them.
    Returns: the files of the target that are the base's -> their names in the base.
    Raises: IntegrityError naming the file if the base is not the one that the delta was made with; CheckpointError if
    the target exists.
    """
    record = load_delta_record(folder)
    _check_base(record, base_folder)
    shards = [base_folder / name for name in sorted(record.base_sha256) if name.endswith(".safetensors")]
    of_base: dict[str, str] = {}
    sizes: dict[str, int] = {}
    weight_map: dict[str, str] = {}
    with _write_beside(target) as partial:
        for number, source in enumerate([*shards, folder / TENSORS_FILE], start=1):
            # Renamed: a base of one file is called model.safetensors, which would be taken for the whole.
            name = f"model-{number:05d}-of-{len(shards) + 1:05d}.safetensors"
            if links:
                (partial / name).symlink_to(source.resolve())
            else:
                _link_or_copy(source, partial / name)
            if source in shards:
                of_base[name] = source.name
            found = _read_tensor_sizes(source)
            sizes |= found
            weight_map |= dict.fromkeys(found, name)
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(partial / _INDEX_FILE, index)
        _copy_side_files(folder, partial)
    return of_base


def export_snowflake(folder: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write a checkpoint that Snowflake's training and serving code reads: all tensors, all keys, also older ones.

    `dtype` None keeps the checkpoint's. The whole model is in memory meanwhile.
    Raises: CheckpointError for a family that Snowflake's code does not know, a checkpoint without the teacher's own
    projections, or a target that exists.
    Source: fact sheet of SwiftKV, section 6.
    """
    model_type = _read_student_config(folder)["model_type"]
    if model_type not in SNOWFLAKE_MODEL_TYPES:
        raise CheckpointError(
            f"{folder}: Snowflake's tools know no {model_type} models, only {' and '.join(SNOWFLAKE_MODEL_TYPES)}. "
            "Serve it with `swiftkv serve`."
        )
    model = load_student(folder, dtype)
    if not model.model.has_teacher:
        raise CheckpointError(
            f"{folder}: stored without the teacher's own q_proj, k_proj and v_proj of later layers, which Snowflake's "
            "tools load. Make a delta of it and restore that: `swiftkv delta save`, `swiftkv delta restore`."
        )
    with _write_beside(target) as partial:
        save_student(model, partial, folder)
        config = read_config(partial)
        # As transformers before 4.56 calls what it calls `dtype` now.
        _write_json(partial / "config.json", config | {"torch_dtype": config["dtype"]})


def _save_delta(whole: Path, folder: Path, base: Base) -> None:
    _read_student_config(whole)
    read_config(base.folder)
    files = _index_tensors(whole)
    own = sorted(name for name in files if "swiftkv" in name)
    _require_same_tensors({name: file for name, file in files.items() if name not in own}, base, whole)
    with _write_beside(folder) as partial:
        save_file({name: _load_tensor(files[name], name) for name in own}, partial / TENSORS_FILE, {"format": "pt"})
        _copy_side_files(whole, partial)
        hashed = {
            file.name: _compute_sha256(file) for file in [base.folder / "config.json", *_find_shards(base.folder)]
        }
        record = DeltaRecord(base_name=base.name, base_revision=base.revision, base_sha256=hashed)
        _write_json(partial / RECORD_FILE, record.model_dump())


def _read_student_config(folder: Path) -> dict[str, str]:
    if (folder / RECORD_FILE).is_file():
        raise CheckpointError(f"{folder}: a delta, not a whole checkpoint. Use `swiftkv delta restore` first.")
    config = read_config(folder)
    if config.get("model_type") not in FAMILIES:
        raise CheckpointError(
            f"{folder}: model_type is {config.get('model_type')!r}, which is not a SwiftKV checkpoint "
            f"({', '.join(FAMILIES)}). Distill the model first."
        )
    return config


def _require_same_tensors(files: dict[str, Path], base: Base, whole: Path) -> None:
    of_base = _index_tensors(base.folder)
    for name, file in files.items():
        if name not in of_base or not _are_same(_load_tensor(file, name), _load_tensor(of_base[name], name)):
            raise CheckpointError(
                f"{whole}: {name} is not the tensor of {base.name}, bit for bit. Give the teacher that it was "
                "distilled from, in the dtype that it was distilled in."
            )


def _are_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def _check_base(record: DeltaRecord, base_folder: Path) -> None:
    for name, expected in record.base_sha256.items():
        path = base_folder / name
        found = _compute_sha256(path) if path.is_file() else None
        if found != expected:
            problem = f"has SHA-256 {found}" if found else "is missing"
            raise IntegrityError(
                f"{path}: {problem}, but the delta was made with {expected}. "
                f"Give {record.base_name}" + (f" at revision {record.base_revision}." if record.base_revision else ".")
            )


def _find_shards(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads, in order."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / _INDEX_FILE
    if not index.is_file():
        raise CheckpointError(f"{folder}: neither model.safetensors nor {_INDEX_FILE}. Restore the folder's files.")
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {', '.join(missing)} missing. Restore the folder's files.")
    return [folder / name for name in names]


def _index_tensors(folder: Path) -> dict[str, Path]:
    return {name: file for file in _find_shards(folder) for name in _read_tensor_sizes(file)}


def _read_tensor_sizes(file: Path) -> dict[str, int]:
    """Bytes of each tensor, from the file's header."""
    with file.open("rb") as content:
        header = json.loads(content.read(int.from_bytes(content.read(8), "little")))
    header.pop("__metadata__", None)
    return {name: about["data_offsets"][1] - about["data_offsets"][0] for name, about in header.items()}


def _load_tensor(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name)


def _compute_sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def _copy_side_files(source: Path, target: Path) -> None:
    shutil.copyfile(source / "config.json", target / "config.json")
    copy_side_files(source, target)


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def _write_beside(target: Path) -> Iterator[Path]:
    """A folder that becomes the target when all of it is written, and is removed when something fails."""
    if target.exists():
        raise CheckpointError(f"{target}: exists already. Give a folder that does not.")
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial)
        raise
