"""The vLLM engine gives the greedy tokens of the independent reference, in float32, whatever its settings.

Each engine starts once. CI covers every value of every setting; `make soak` the whole matrix.
"""

import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fakes import LLAMA3_ROPE_SCALING, TinyShape, random_prompt_ids, write_student
from reference import generate_greedy, load_weights

from swiftkv.engine.compiler import has_cxx_compiler
from swiftkv.engine.llm import generate_tokens, run_engine
from swiftkv.engine.settings import EngineSettings
from swiftkv.errors import EngineError

pytestmark = pytest.mark.engine

NEW_TOKENS = 10
LENGTHS = (1, 2, 3, 17, 64, 127, 128, 129, 300, 451, 600)
PROMPTS = [random_prompt_ids(random.Random(length), length) for length in LENGTHS]


@dataclass(frozen=True)
class Setup:
    """One engine of the matrix."""

    group: int
    eager: bool
    chunked_prefill: bool
    prefix_caching: bool
    skipping: bool = True
    keep_teacher: bool = True
    variant: str = "plain"

    def __str__(self) -> str:
        words = (f"group {self.group}", "eager" if self.eager else "inductor")
        flags = ("chunked_prefill", "prefix_caching", "skipping", "keep_teacher")
        return ", ".join((*words, self.variant, *(f"{'' if getattr(self, flag) else 'no '}{flag}" for flag in flags)))


IN_CI = [
    Setup(group=1, eager=True, chunked_prefill=True, prefix_caching=True),
    Setup(group=1, eager=False, chunked_prefill=False, prefix_caching=False),
    Setup(group=2, eager=True, chunked_prefill=False, prefix_caching=True, keep_teacher=False, variant="other"),
    Setup(group=2, eager=False, chunked_prefill=True, prefix_caching=False),
    Setup(group=2, eager=True, chunked_prefill=True, prefix_caching=False, skipping=False),
]
IN_SOAK = [
    setup
    for values in itertools.product((1, 2, 4), (True, False), (True, False), (True, False), (True, False))
    if (setup := Setup(*values)) not in IN_CI
]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "other": {"tied": True, "attention_bias": True, "rope_scaling": LLAMA3_ROPE_SCALING, "num_shards": 3},
}
"""What checkpoints differ in, beside the cut."""


def has_compiler_if_needed(setup: Setup) -> bool:
    """CI has a compiler, and must not leave anything out."""
    return setup.eager or has_cxx_compiler() or "CI" in os.environ


NEEDS_COMPILER = "needs g++ and python3-dev, without which engines run eager"
MATRIX = [
    pytest.param(
        setup, id=str(setup), marks=pytest.mark.skipif(not has_compiler_if_needed(setup), reason=NEEDS_COMPILER)
    )
    for setup in IN_CI
]
MATRIX += [pytest.param(setup, id=str(setup), marks=pytest.mark.soak) for setup in IN_SOAK]


@pytest.fixture(scope="module", params=MATRIX)
def setup(request: pytest.FixtureRequest) -> Setup:
    return request.param


@pytest.fixture(scope="module")
def folder(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(
        tmp_path_factory.mktemp("student"),
        num_key_value_layers=2,
        key_value_group_size=setup.group,
        keep_teacher_projections=setup.keep_teacher,
        **VARIANTS[setup.variant],
    )


@pytest.fixture(scope="module")
def engine(setup: Setup, folder: Path) -> Iterator[Any]:
    settings = EngineSettings(
        dtype="float32",
        max_model_len=700,
        max_num_seqs=8,
        max_num_batched_tokens=160 if setup.chunked_prefill else 700,
        enable_chunked_prefill=setup.chunked_prefill,
        enable_prefix_caching=setup.prefix_caching,
        enforce_eager=setup.eager,
        kv_cache_gib=0.25,
        skipping=setup.skipping,
    )
    with run_engine(folder, settings) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    config, weights = load_weights(folder)
    return [generate_greedy(config, weights, prompt, NEW_TOKENS) for prompt in PROMPTS]


def test_one_batch_gives_the_reference_tokens(engine: Any, folder: Path, expected: list[list[int]]) -> None:
    assert_same(generate_tokens(engine, PROMPTS, NEW_TOKENS), expected, folder)


def test_prompts_that_arrive_while_others_decode_give_the_reference_tokens(
    engine: Any, folder: Path, expected: list[list[int]]
) -> None:
    assert_same(generate_staggered(engine.llm_engine, PROMPTS), expected, folder)


def test_prompts_seen_before_and_prompts_that_share_a_prefix_give_the_reference_tokens(
    engine: Any, folder: Path, setup: Setup
) -> None:
    config, weights = load_weights(folder)
    base = PROMPTS[LENGTHS.index(300)]
    prompts = [base, base, base[:256] + PROMPTS[3], base[:200]]
    generate_tokens(engine, [base], 1)  # leaves its KV behind
    requests = [generate_tokens(engine, [prompt], NEW_TOKENS)[0] for prompt in prompts]
    assert_same(requests, [generate_greedy(config, weights, prompt, NEW_TOKENS) for prompt in prompts], folder)
    caching = engine.llm_engine.vllm_config.cache_config.enable_prefix_caching
    assert caching is setup.prefix_caching


def test_skipping_is_on_by_default_and_off_when_asked(engine: Any, setup: Setup) -> None:
    assert engine.llm_engine.vllm_config.cache_config.kv_sharing_fast_prefill is setup.skipping


def generate_staggered(llm_engine: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Add a request every other step, so that prefills and decodes share batches."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    waiting = list(enumerate(prompts))
    done: dict[int, list[int]] = {}
    mixed_steps = 0
    for step in itertools.count():
        if waiting and step % 2 == 0:
            index, prompt = waiting.pop(0)
            llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, parameters)
        outputs = llm_engine.step()
        mixed_steps += len(outputs) > 1
        done |= {int(o.request_id.split("-")[0]): list(o.outputs[0].token_ids) for o in outputs if o.finished}
        if len(done) == len(prompts):
            assert mixed_steps > len(prompts), "requests must overlap, or this tests nothing"
            return [done[index] for index in range(len(prompts))]
    raise AssertionError("unreachable")


def assert_same(tokens: list[list[int]], expected: list[list[int]], folder: Path) -> None:
    for got, want, length in zip(tokens, expected, LENGTHS, strict=False):
        if got != want:
            first = next(i for i, pair in enumerate(zip(got, want, strict=True)) if pair[0] != pair[1])
            pytest.fail(f"prompt of {length} tokens differs at new token {first}: {got} instead of {want}")
    assert len(tokens) == len(expected)


def test_later_layers_run_only_for_sampled_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the rows that enter the later half, in the engine's own process.

    The model's context is longer than the KV cache can hold, which must not keep the engine from starting.
    """
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # sends the two functions below to the worker
    folder = write_student(tmp_path, TinyShape(max_position_embeddings=131_072))
    settings = EngineSettings(dtype="float32", max_num_batched_tokens=700, enforce_eager=True, kv_cache_gib=0.05)
    with run_engine(folder, settings) as llm:
        assert 700 < llm.llm_engine.vllm_config.model_config.max_model_len < 131_072
        llm.apply_model(count_rows)
        generate_tokens(llm, [PROMPTS[-1], PROMPTS[4]], 3)
        first, later = llm.apply_model(read_rows)[0]
    assert sum(first) == 600 + 64 + 2 * 2
    assert sum(later) == 2 * 3, "one row per sampled token, whatever the prompt's length"


def count_rows(model: Any) -> None:
    """Runs in the worker: note the rows that enter the first and the last layer at each step."""
    model.rows = ([], [])
    for layer, rows in zip((model.model.layers[0], model.model.layers[-1]), model.rows, strict=True):
        layer.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(len(args[0])))


def read_rows(model: Any) -> tuple[list[int], list[int]]:
    """Runs in the worker."""
    return model.rows


def test_a_folder_that_vllm_cannot_load_is_an_engine_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="vLLM did not start"), run_engine(tmp_path, EngineSettings()):
        pass
