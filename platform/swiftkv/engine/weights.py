"""Which tensors of a SwiftKV checkpoint an engine needs, under which names, and reading only these.

A checkpoint may keep the teacher's own projections of the later layers, which serving never needs; the prefill half
needs none of the later layers but the holders' projections, and no LM head.
Called by: engine/model.py, bench/file_cache.py. Calls: safetensors.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load

from swiftkv.spec import SwiftKVSpec

NamedTensors = Iterable[tuple[str, torch.Tensor]]

_LAYER = re.compile(r"(?P<layers>(?:.+\.)?layers)\.(?P<layer>\d+)\.(?P<part>.+)")
_HOLDER_PART = re.compile(r"self_attn\.((?:[kv]_proj_swiftkv|k_norm)\..+)")
_KV_SCALE = re.compile(r"self_attn\.([qkv]_scale)")
_TEACHER_PART = re.compile(r"self_attn\.(?:[qkv]_proj|k_norm)\.")


def place_tensor(name: str, spec: SwiftKVSpec, prefill_only: bool) -> list[str]:
    """The engine's names for a tensor of the checkpoint; none where the engine has no use for it.

    A group's KV scales go to its holder and to each of its readers: an FP8 cache is written with the one and read
    with the others.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return [] if prefill_only and not name.startswith(("model.embed_tokens.", "model.norm_swiftkv.")) else [name]
    layers, layer, part = match["layers"], int(match["layer"]), match["part"]
    scale = _KV_SCALE.fullmatch(part)
    if layer < spec.num_key_value_layers:
        return [f"{layers}.{layer}.self_attn.attn.{scale[1]}" if scale else name]
    holders = f"{layers.removesuffix('layers')}kv_holders.{layer}"
    is_leader = layer in spec.leader_layers
    if scale:
        group = range(layer, layer + spec.key_value_group_size) if is_leader and not prefill_only else ()
        readers = [f"{layers}.{reader}.self_attn.attn.{scale[1]}" for reader in group]
        return [f"{holders}.attn.{scale[1]}", *readers] if is_leader else []
    if (held := _HOLDER_PART.fullmatch(part)) is not None:
        return [f"{holders}.{held[1]}"] if is_leader else []
    return [] if prefill_only or _TEACHER_PART.match(part) else [name]


def place_tensors(tensors: NamedTensors, spec: SwiftKVSpec, prefill_only: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that the engine needs, under its names."""
    for name, tensor in tensors:
        for placed in place_tensor(name, spec, prefill_only):
            yield placed, tensor


def list_tensor_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files: those that its index names, or all where there is no index, as in vLLM.

    Publishers leave other files beside them, such as the same weights under other names.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})


def has_tensor_files(folder: Path) -> bool:
    """Whether the checkpoint's tensors lie in the folder."""
    files = list_tensor_files(folder) if folder.is_dir() else []
    return bool(files) and all(file.is_file() for file in files)


def list_tensors(file: Path) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and end of each tensor in a safetensors file."""
    for name, start, end, _ in _read_header(file):
        yield name, start, end


def read_prefill_tensors(folder: Path, spec: SwiftKVSpec) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that the prefill half needs, under the engine's names; the bytes of the others are never read.

    Not through a mapped file, as safetensors and vLLM read: the kernel reads ahead of those, into the neighbours.
    """
    for path in list_tensor_files(folder):
        with _open_without_reading_ahead(path) as file:
            for name, start, end, entry in _read_header(path):
                for placed in place_tensor(name, spec, prefill_only=True):
                    file.seek(start)
                    yield placed, build_tensor(entry, file.read(end - start))


def _read_header(file: Path) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
    with _open_without_reading_ahead(file) as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield name, 8 + length + start, 8 + length + end, entry


def _open_without_reading_ahead(path: Path) -> BinaryIO:
    file = path.open("rb")
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return file


def build_tensor(entry: dict[str, Any], data: bytes) -> torch.Tensor:
    """The tensor as safetensors reads it from a file that holds nothing else."""
    header = json.dumps({"tensor": entry | {"data_offsets": [0, len(data)]}}).encode()
    header += b" " * (-len(header) % 8)
    return load(len(header).to_bytes(8, "little") + header + data)["tensor"]
