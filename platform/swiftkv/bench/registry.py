"""Publishing and pulling a version against the store's plain copy tool followed by `sha256sum`, and their memory.

Each side is a process from its start to its end, as a user types it; the two take turns, every file's pages dropped
before. The bucket is a local S3 server's (bench/s3.py), a fresh one for each pair.
Called by: cli/bench.py. Calls: the `swiftkv` command, cp, aws, sha256sum.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from swiftkv.bench.file_cache import drop_from_memory
from swiftkv.bench.pairs import describe_processor
from swiftkv.bench.ratios import compute_ratio
from swiftkv.bench.s3 import run_s3_server
from swiftkv.bench.table import Result, Row
from swiftkv.errors import RegistryError

MEMORY_BOUND_BYTES = 300e6

_WHAT = {
    "publish-folder": "publish into a folder: seconds over cp's and sha256sum's",
    "pull-folder": "pull from a folder: seconds over cp's and sha256sum's",
    "publish-bucket": "publish into a bucket: seconds over aws s3 cp's and sha256sum's",
    "pull-bucket": "pull from a bucket: seconds over aws s3 cp's and sha256sum's",
}
ROWS = {name: Row(name, what, 1.5, is_least=False) for name, what in _WHAT.items()}
MEMORY_ROW = Row("memory", "peak memory of publish and pull over 300 MB", 1.0, is_least=False)

_POLL_S = 0.02
_WHOLE_OBJECTS = "64GB"
"""The size from which `aws s3 cp` asks for ranges of an object when it copies out. moto's server reads a whole object
for each range of it, which took the tool 120 s for 2 GB; the tool gets each object in one piece, its best here."""
_SWIFTKV = [sys.executable, "-m", "swiftkv.cli"]


@dataclass(frozen=True)
class Run:
    """One process."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Tools:
    """The store's own way to copy a folder in and out, and what its clients' environment says."""

    store: str
    copy_in: Callable[[Path], list[object]]
    copy_out: Callable[[Path], list[object]]
    environment: Mapping[str, str]


def measure_registry(num_bytes: int, pairs: int, say: Callable[[str], None]) -> tuple[list[Result], dict[str, Any]]:
    """Rows and figures. Raises: RegistryError if a tool is missing or fails."""
    for tool in ("cp", "sha256sum"):
        if shutil.which(tool) is None:
            raise RegistryError(f"{tool}: not found. Install it.")
    aws = Path(sys.executable).with_name("aws")
    if not aws.exists():
        raise RegistryError("aws: not found beside this Python. Install the extra dev.")
    runs: dict[str, list[tuple[Run, Run]]] = {name: [] for name in ROWS}
    with tempfile.TemporaryDirectory(prefix="swiftkv-bench-") as scratch:
        checkpoint = write_checkpoint(Path(scratch) / "checkpoint", num_bytes)
        for number in range(pairs):
            for kind, open_tools in (("folder", _open_folder), ("bucket", _open_bucket)):
                say(f"{kind}, pair {number + 1} of {pairs}")
                work = Path(scratch) / "work"
                work.mkdir()
                with open_tools(work, aws) as tools:
                    _measure_pair(checkpoint, work, tools, ours_first=number % 2 == 0, kind=kind, runs=runs)
                shutil.rmtree(work)
    return _build_results(runs, num_bytes), {
        "hardware": describe_processor(),
        "version_bytes": num_bytes,
        "seconds": {
            name: {
                "swiftkv": [round(ours.seconds, 2) for ours, _ in pair_runs],
                "copy_and_sha256sum": [round(plain.seconds, 2) for _, plain in pair_runs],
            }
            for name, pair_runs in runs.items()
        },
    }


def write_checkpoint(folder: Path, num_bytes: int) -> Path:
    """A folder of that size that the registry takes: a tiny SwiftKV model, and noise in two files."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaSwiftKVForCausalLM"],
        "model_type": "llama_swiftkv",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 32,
        "num_key_value_layers": 1,
        "key_value_group_size": 1,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    names = ["model.norm_swiftkv", *(f"model.layers.1.self_attn.{part}_proj_swiftkv" for part in "qkv")]
    tensors = {f"{name}.weight": np.ones((8, 8), np.float32) for name in names}
    random = np.random.default_rng(0)
    for number in (1, 2):
        noise = {f"noise.{number}": random.integers(0, 256, num_bytes // 2, dtype=np.uint8)}
        save_file(noise | (tensors if number == 1 else {}), folder / f"model-{number:05d}-of-00002.safetensors")
    return folder


def _measure_pair(
    checkpoint: Path, work: Path, tools: Tools, ours_first: bool, kind: str, runs: dict[str, list[tuple[Run, Run]]]
) -> None:
    ours, plain = work / "ours", work / "plain"
    home = {"SWIFTKV_HOME": str(work / "home")}
    publish = [*_SWIFTKV, "publish", checkpoint, "--name", "bench", "--store", tools.store]
    pull = [*_SWIFTKV, "models", "pull", "bench", ours, "--store", tools.store]
    copy_in = f"{_join(tools.copy_in(checkpoint))} && sha256sum {_join(sorted(checkpoint.iterdir()))}"
    copy_out = f"{_join(tools.copy_out(plain))} && sha256sum {shlex.quote(str(plain))}/*"
    commands: dict[str, tuple[Sequence[object], Sequence[object]]] = {
        "publish": (publish, ["sh", "-c", copy_in]),
        "pull": (pull, ["sh", "-c", copy_out]),
    }
    for step, sides in commands.items():
        measured: dict[int, Run] = {}
        for side in (0, 1) if ours_first else (1, 0):
            drop_from_memory(file for folder in (checkpoint, work) for file in folder.rglob("*") if file.is_file())
            measured[side] = _run(sides[side], os.environ | tools.environment | home)
        runs[f"{step}-{kind}"].append((measured[0], measured[1]))


@contextmanager
def _open_folder(work: Path, aws: Path) -> Iterator[Tools]:
    plain = work / "plain-store"
    yield Tools(
        str(work / "store"),
        lambda source: ["cp", "-r", source, plain],
        lambda target: ["cp", "-r", plain, target],
        {},
    )


@contextmanager
def _open_bucket(work: Path, aws: Path) -> Iterator[Tools]:
    with run_s3_server() as server:
        server.create_bucket("models")
        server.create_bucket("plain")
        quiet = ["--recursive", "--only-show-errors"]
        whole = work / "aws-config"
        whole.write_text(f"[default]\ns3 =\n  multipart_threshold = {_WHOLE_OBJECTS}\n", encoding="utf-8")
        yield Tools(
            "s3://models",
            lambda source: [aws, "s3", "cp", *quiet, source, "s3://plain/version"],
            lambda target: ["env", f"AWS_CONFIG_FILE={whole}", aws, "s3", "cp", *quiet, "s3://plain/version", target],
            server.environment,
        )


def _run(command: Sequence[object], environment: Mapping[str, str]) -> Run:
    words = [str(word) for word in command]
    started, peak_bytes = time.monotonic(), 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(words, env=environment, stdout=said, stderr=said)
        while process.poll() is None:
            peak_bytes = max(peak_bytes, _read_peak(process.pid))
            time.sleep(_POLL_S)
        seconds = time.monotonic() - started
        if process.returncode:
            said.seek(0)
            raise RegistryError(f"{shlex.join(words)}: failed: {said.read().decode(errors='replace').strip()}")
    return Run(seconds, peak_bytes)


def _read_peak(pid: int) -> int:
    """Peak resident bytes so far. Not what the kernel tells when it ends, which counts the parent's before `exec`."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _build_results(runs: dict[str, list[tuple[Run, Run]]], num_bytes: int) -> list[Result]:
    results = []
    for name, row in ROWS.items():
        ratio = compute_ratio(*zip(*((ours.seconds, plain.seconds) for ours, plain in runs[name]), strict=True))
        seconds = [float(np.median([pair[side].seconds for pair in runs[name]])) for side in (0, 1)]
        ours, plain = (f"{value:.1f} s for {num_bytes / 1e9:g} GB" for value in seconds)
        results.append(Result(row, ratio, plain, ours))
    peak = max(ours.peak_bytes for pair_runs in runs.values() for ours, _ in pair_runs)
    memory = compute_ratio([peak], [MEMORY_BOUND_BYTES])
    results.append(Result(MEMORY_ROW, memory, "300 MB", f"{peak / 1e6:.0f} MB"))
    return results


def _join(words: list[Any]) -> str:
    return shlex.join([str(word) for word in words])
