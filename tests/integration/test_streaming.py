"""Engines whose tensors come straight from a bucket: the tokens of files, and the prefill half from half of them."""

import random
from pathlib import Path

import pytest
from fakes import random_prompt_ids, write_student

from swiftkv.bench.s3 import run_s3_server
from swiftkv.engine.llm import generate_greedy, prefill_remotely, run_engine
from swiftkv.engine.settings import EngineSettings
from swiftkv.registry.registry import Registry
from swiftkv.serving.config import PoolSettings
from swiftkv.serving.fetching import fetch_version
from swiftkv.serving.source import resolve_model

pytestmark = pytest.mark.engine

SETTINGS = EngineSettings(dtype="float32", max_model_len=256, enforce_eager=True, kv_cache_gib=0.05, max_num_seqs=4)


def test_a_streamed_engine_gives_the_tokens_of_one_that_reads_files(tmp_path, monkeypatch):
    monkeypatch.setenv("SWIFTKV_HOME", str(tmp_path / "home"))
    prompts = [random_prompt_ids(random.Random(seed), 40) for seed in range(4)]
    student = write_student(tmp_path / "student", num_shards=3)
    with run_s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        store = server.create_bucket("models")
        Registry(store).publish(student, "tiny")
        pool = PoolSettings(model="tiny", store=store, stream=True, engine=SETTINGS)
        resolved = resolve_model(pool)
        assert resolve_model(resolved) == resolved, "Serve resolves again what the driver resolved"
        assert str(fetch_version(resolved.published, with_weights=False).path) == resolved.model
        assert not list((tmp_path / "home").rglob("*.safetensors"))
        tokens = []
        for folder, settings in ((student, SETTINGS), (resolved.model, resolved.engine)):
            with run_engine(Path(folder), settings) as llm:
                outputs = generate_greedy(llm, prompts, 8)
                tokens.append([list(output.outputs[0].token_ids) for output in outputs])
        assert tokens[0] == tokens[1]
        assert len({tuple(answer) for answer in tokens[0]}) > 1
        half = resolved.engine.model_copy(update={"role": "prefill", "kv_transfer": "producer"})
        with run_engine(Path(resolved.model), half) as llm:
            assert all(transfer["remote_block_ids"] for transfer in prefill_remotely(llm, prompts))
        assert not list((tmp_path / "home").rglob("*.safetensors"))
