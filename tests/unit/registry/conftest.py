"""A complete SwiftKV checkpoint folder of a few kilobytes (more, where a test asks), and registries for it."""

import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from swiftkv.bench.s3 import S3Server, run_s3_server
from swiftkv.registry.registry import Registry

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaSwiftKVForCausalLM"],
    "model_type": "llama_swiftkv",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "num_key_value_layers": 2,
    "key_value_group_size": 2,
}
LEADERS = (2, 4)


def build_tensors(seed: int, filler_bytes: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    names = ["model.embed_tokens.weight", "model.norm_swiftkv.weight"]
    names += [f"model.layers.{layer}.self_attn.q_proj_swiftkv.weight" for layer in range(2, 6)]
    names += [f"model.layers.{layer}.self_attn.{part}_proj_swiftkv.weight" for layer in LEADERS for part in "kv"]
    tensors = {name: random.standard_normal((8, 8)).astype(np.float32) for name in names}
    tensors["filler"] = random.integers(0, 256, filler_bytes, dtype=np.uint8)
    return tensors


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """A folder that passes every check. `rename` maps tensor names; config keys set to None are left out."""

    def make(
        name: str = "checkpoint",
        seed: int = 0,
        filler_bytes: int = 0,
        rename: Callable[[str], str | None] = lambda tensor: tensor,
        **config: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        settings = {key: value for key, value in (CONFIG | config).items() if value is not None}
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "tokenizer.json").write_text("{}")
        tensors = {rename(key): value for key, value in build_tensors(seed, filler_bytes).items()}
        save_file({key: value for key, value in tensors.items() if key}, folder / "model.safetensors")
        return folder

    return make


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint()


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFTKV_HOME", str(tmp_path / "home"))


@pytest.fixture
def local(tmp_path: Path) -> Registry:
    """A registry in a folder."""
    return Registry(tmp_path / "store")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with run_s3_server() as server:
        yield server


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store that other processes reach too: a folder, and a bucket over HTTP."""
    return find_store(request, tmp_path, monkeypatch)


def find_store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "local":
        return str(tmp_path / "store")
    server: S3Server = request.getfixturevalue("s3_server")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server.create_bucket(f"store-{uuid.uuid4().hex}") + "/below"


@pytest.fixture(params=["local", "memory", "s3"])
def registry(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The registry in a folder, in memory, and in a bucket over HTTP."""
    if request.param == "memory":
        return Registry("memory:///")
    return Registry(find_store(request, tmp_path, monkeypatch))


@pytest.fixture
def read_all() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder: relative path -> bytes."""

    def read(folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    return read
