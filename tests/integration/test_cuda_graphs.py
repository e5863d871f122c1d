"""On a GPU, decode-only steps replay CUDA graphs, compiled halves give the reference's tokens, and none falls back.

Needs a CUDA device and vLLM's CUDA build; not run in CI. That the later half reads its inputs at fixed addresses,
which graphs rest on, is tested on any machine in test_engine.py.
"""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fakes import TinyShape, random_prompt_ids, write_student
from reference import compute_top2_gap, generate_greedy, load_weights

from swiftkv.engine.llm import generate_tokens, run_engine
from swiftkv.engine.settings import EngineSettings

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

PROMPTS = [random_prompt_ids(Random(length), length) for length in (1, 5, 64, 129, 300, 451, 600)]
NEW_TOKENS = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = TinyShape(hidden_size=256, head_dim=64, max_position_embeddings=4096)
    return write_student(tmp_path_factory.mktemp("student"), shape, num_key_value_layers=2, key_value_group_size=2)


@pytest.fixture(scope="module", params=[0, 3], ids=["plain", "n-gram speculation"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        settings = EngineSettings(
            dtype="bfloat16", max_model_len=1024, max_num_seqs=8, max_num_batched_tokens=512, kv_cache_gib=1.0,
            num_ngram_tokens=request.param,
        )  # fmt: skip
        with run_engine(folder, settings) as llm:
            yield llm


def test_graphs_of_both_halves_are_captured(engine: Any) -> None:
    mode = engine.llm_engine.vllm_config.compilation_config.cudagraph_mode
    assert mode.has_piecewise_cudagraphs(), "mixed batches need graphs of their own"
    assert mode.has_full_cudagraphs() is (engine.llm_engine.vllm_config.speculative_config is None)
    captured, _ = engine.apply_model(read_graphs)[0]
    assert captured > 2 * 8, "several sizes of each half"


def test_tokens_are_the_references_but_for_near_ties(engine: Any, folder: Path) -> None:
    config, weights = load_weights(folder)
    for prompt, tokens in zip(PROMPTS, generate_tokens(engine, PROMPTS, NEW_TOKENS), strict=True):
        expected = generate_greedy(config, weights, prompt, NEW_TOKENS)
        first = next((i for i in range(NEW_TOKENS) if tokens[i] != expected[i]), None)
        if first is not None:
            assert compute_top2_gap(config, weights, prompt, expected[: first + 1])[first] < 0.2


def test_decoding_replays_graphs_and_captures_no_more(engine: Any) -> None:
    """A step that fell back to eager would run the layers' Python; graphs do not."""
    captured, _ = engine.apply_model(read_graphs)[0]
    engine.apply_model(count_layer_calls)
    generate_tokens(engine, PROMPTS[:1], 2)
    _, one_step = engine.apply_model(read_graphs)[0]
    generate_tokens(engine, PROMPTS[:1], 60)
    again, many_steps = engine.apply_model(read_graphs)[0]
    assert again == captured
    assert many_steps - one_step <= one_step, "59 decode steps must not run the layers' Python"


def count_layer_calls(model: Any) -> None:
    """Runs in the worker."""
    model.calls = 0

    def note(*_: Any) -> None:
        model.calls += 1

    model.model.layers[-1].self_attn.o_proj.register_forward_pre_hook(note)


def read_graphs(model: Any) -> tuple[int, int]:
    """Runs in the worker: CUDA graphs captured so far, and calls noted by `count_layer_calls`."""
    from vllm.compilation.counter import compilation_counter

    return compilation_counter.num_cudagraph_captured, getattr(model, "calls", 0)
