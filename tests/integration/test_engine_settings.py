"""Settings that change what an engine holds or computes: quantised weights, FP8 KV, adapters, speculation, pressure.

Answers are compared with the reference, fed with the engine's own tokens: each token's log probability, and how far
the token is from the reference's best. In float32 without quantisation both are rounding; with it they have limits
that are explained where they are used. Settings of scheduling and compilation are in test_engine.py.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import merge_adapter, write_adapter
from fakes import TinyShape, random_prompt_ids, write_student, write_teacher, write_tokenizer
from quantise import add_kv_scales, count_quantised, load_dequantised, quantise_student
from reference import Config, Weights, compute_log_probs, generate_greedy, load_weights
from safetensors.torch import load_file

from swiftkv.engine.llm import run_engine
from swiftkv.engine.settings import EngineSettings
from swiftkv.evaluate.tasks import generate_answers
from swiftkv.model.checkpoint import load_tokenizer
from swiftkv.spec import SwiftKVSpec

pytestmark = pytest.mark.engine

NEW_TOKENS = 10
LENGTHS = (1, 3, 17, 64, 129, 300)
PROMPTS = [random_prompt_ids(random.Random(length), length) for length in LENGTHS]
ROUNDING = 1e-3
"""Most nats that two float32 implementations differ by."""

NEEDS_FP8 = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM has an FP8 KV cache on CPUs with AVX-512 only"
)

INT8_DTYPE: Any = "bfloat16" if torch.cpu.get_capabilities().get("amx_tile") else "float32"
"""vLLM's int8 products on CPUs with AMX take no float32, which the verifier refuses there."""


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, and the log probability that the engine reports of each."""

    tokens: list[int]
    log_probs: list[float]


def make_settings(**changes: Any) -> EngineSettings:
    """Float32, eager, prompts in chunks of 160 tokens, with these changes."""
    values: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 700,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 160,
        "enforce_eager": True,
        "kv_cache_gib": 0.1,
    }
    return EngineSettings(**(values | changes))


def answer_all(
    llm: Any, prompts: list[list[int]], new_tokens: int = NEW_TOKENS, adapters: list[Any] | None = None
) -> list[Answer]:
    """Answers to prompts in one batch, each with its adapter if there are any (None: the model itself)."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, logprobs=0)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(requests, parameters, use_tqdm=False, lora_request=adapters)
    return [read_answer(output.outputs[0]) for output in outputs]


def read_answer(completion: Any) -> Answer:
    tokens = list(completion.token_ids)
    return Answer(tokens, [known[token].logprob for token, known in zip(tokens, completion.logprobs, strict=True)])


def compare(config: Config, weights: Weights, prompt: list[int], answer: Answer) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token, in nats: how far its log probability is from the reference's, and that from the best one's."""
    reference_AV = compute_log_probs(config, weights, prompt, answer.tokens)
    of_tokens_A = reference_AV[torch.arange(len(answer.tokens)), torch.tensor(answer.tokens)]
    return (of_tokens_A - torch.tensor(answer.log_probs)).abs(), reference_AV.amax(dim=-1) - of_tokens_A


def assert_same(
    config: Config, weights: Weights, prompts: list[list[int]], answers: list[Answer], new_tokens: int = NEW_TOKENS
) -> None:
    """The reference's tokens and log probabilities."""
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = generate_greedy(config, weights, prompt, new_tokens)
        assert answer.tokens == expected, f"prompt of {len(prompt)} tokens"
        assert compare(config, weights, prompt, answer)[0].max() < ROUNDING, f"prompt of {len(prompt)} tokens"


def measure_differences(
    config: Config, weights: Weights, prompts: list[list[int]], answers: list[Answer]
) -> tuple[float, float]:
    """Mean difference of log probabilities, and mean distance from the best token, over all answers."""
    pairs = [compare(config, weights, *both) for both in zip(prompts, answers, strict=True)]
    return tuple(float(torch.cat(column).mean()) for column in zip(*pairs, strict=True))  # type: ignore[return-value]


def read_counter(llm: Any, name: str) -> int:
    """A counter of vLLM's own metrics; of all engines that this process has started, so compare two readings."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


@pytest.fixture(autouse=True)
def _may_send_functions_to_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")


@pytest.fixture(scope="module")
def student(models_folder: Path) -> Path:
    """A student with a tokenizer, whose groups have one layer."""
    return write_tokenizer(write_student(models_folder / "settings-student"))


class TestQuantisedWeights:
    """W8A8 as the published checkpoints have it.

    The reference computes with the dequantised weights but unrounded activations, so log probabilities differ: int8
    activations have steps of 1/127 of the row's largest value, and six layers add up to about 0.05 nats (measured).
    FP8 has steps of 1/8 of a power of two: 0.12 nats. vLLM has no FP8 per tensor on CPUs.
    """

    @pytest.mark.parametrize(
        ("kind", "scales", "dtype", "skipping", "family"),
        [
            pytest.param("int", "channel", INT8_DTYPE, True, "llama"),
            pytest.param("int", "channel", INT8_DTYPE, False, "llama", marks=pytest.mark.soak),
            pytest.param("int", "tensor", "bfloat16", True, "qwen2", marks=pytest.mark.soak),
            pytest.param("float", "channel", "bfloat16", True, "llama", marks=pytest.mark.soak),
        ],
    )
    def test_answers_are_those_of_the_dequantised_model(
        self, tmp_path: Path, kind: Any, scales: Any, dtype: Any, skipping: bool, family: str
    ) -> None:
        student = write_student(tmp_path / "student", key_value_group_size=3, family=family)
        folder = quantise_student(student, tmp_path / "quantised", kind, scales)
        assert count_quantised(folder) == 6 * 7 + 3 + 2, "all projections, the teacher's of later layers included"
        config, weights = load_dequantised(folder)
        with run_engine(folder, make_settings(dtype=dtype, skipping=skipping)) as llm:
            assert_holder_has_its_scales(llm, folder)
            answers = answer_all(llm, PROMPTS)
        log_prob_limit, gap_limit = (0.1, 0.025) if kind == "int" else (0.25, 0.06)
        log_prob_difference, gap = measure_differences(config, weights, PROMPTS, answers)
        assert log_prob_difference < log_prob_limit and gap < gap_limit

    @pytest.mark.soak
    def test_skipping_changes_nothing(self, tmp_path: Path) -> None:
        """Rows are quantised one by one, so that the others of a step do not matter."""
        student = write_student(tmp_path / "student")
        folder = quantise_student(student, tmp_path / "quantised")
        answers = []
        for skipping in (True, False):
            with run_engine(folder, make_settings(skipping=skipping, dtype=INT8_DTYPE)) as llm:
                answers.append(answer_all(llm, PROMPTS))
        for skipped, computed in zip(*answers, strict=True):
            assert skipped.tokens == computed.tokens
            assert skipped.log_probs == pytest.approx(computed.log_probs, abs=0.02)


def assert_holder_has_its_scales(llm: Any, folder: Path) -> None:
    """K's scales before V's: the fused projection has a place for Q's too, which must stay out of it."""
    tensors = load_file(folder / "model.safetensors")
    expected: list[float] = []
    for kind in "kv":
        name = f"model.layers.3.self_attn.{kind}_proj_swiftkv.weight"
        scale = tensors[f"{name}_scale"].float().reshape(-1)
        expected += scale.expand(len(tensors[name])).tolist()
    assert llm.apply_model(read_holder_scales)[0] == pytest.approx(expected, rel=1e-6)


def read_holder_scales(model: Any) -> list[float]:
    """Runs in the worker: the weight scale of each row of the first holder's projection."""
    layer = model.model.kv_holders["3"].kv_proj_swiftkv
    scale = layer.weight_scale.float().reshape(-1)
    if len(scale) == 3:  # of Q, K and V
        scale = scale.repeat_interleave(torch.tensor(layer.logical_widths))
    return scale.expand(sum(layer.logical_widths)).tolist()


class TestFP8Cache:
    """One byte per value of K and V: their rounding shows as 0.1 to 0.25 nats (measured), so limits are wide.

    What a wrong scale does is measured in the same engine, to show that the limit would catch it.
    """

    LIMIT = 0.35

    @NEEDS_FP8
    def test_holder_and_readers_use_the_leaders_scales(self, tmp_path: Path) -> None:
        keys, values = [0.5, 0.25, 0.5, 0.25, 99.0, 99.0], [0.25, 0.5, 0.25, 0.125, 99.0, 99.0]
        student = write_student(tmp_path / "student", key_value_group_size=3)
        folder = add_kv_scales(student, tmp_path / "scaled", keys, values)
        config, weights = load_weights(student)
        settings = make_settings(enable_prefix_caching=False)
        with run_engine(folder, settings) as llm:
            scales = llm.apply_model(read_kv_scales)[0]
            answers = answer_all(llm, PROMPTS)
            llm.apply_model(forget_reader_scales)
            wrong_answers = answer_all(llm, PROMPTS)
            cache = llm.llm_engine.vllm_config.cache_config
        names = [f"model.layers.{layer}.self_attn.attn" for layer in range(6)]
        leaders = [0, 1, 2, 3, 3, 3]
        expected = {name: (keys[leader], values[leader]) for name, leader in zip(names, leaders, strict=True)}
        assert scales == expected | {"model.layers.3.self_attn.kv_holder": (keys[3], values[3])}
        assert measure_differences(config, weights, PROMPTS, answers)[0] < self.LIMIT
        assert measure_differences(config, weights, PROMPTS, wrong_answers)[0] > 2 * self.LIMIT
        spec = SwiftKVSpec.from_hf_config(config)
        block_bytes = cache.block_size * spec.compute_kv_bytes_per_token(bytes_per_value=1)
        assert cache.num_gpu_blocks == int(settings.kv_cache_gib * 2**30 / block_bytes)

    @NEEDS_FP8
    @pytest.mark.soak
    def test_kv_of_a_token_shrinks_as_published(self, tmp_path: Path) -> None:
        """Tokens that one budget holds, in bf16, of eight layers of which four are kept: reductions of 25% (groups
        of two), 37.5% (groups of four) and 62.5% (groups of two, FP8)."""
        shape = TinyShape(num_hidden_layers=8)
        teacher = write_teacher(tmp_path / "teacher", shape, dtype=torch.bfloat16)
        capacities = {}
        for name, group, cache in (
            ("teacher", 0, "auto"),
            ("two", 2, "auto"),
            ("four", 4, "auto"),
            ("two in fp8", 2, "fp8"),
        ):
            folder = teacher
            if group:
                folder = write_student(tmp_path / name, shape, 4, group, dtype=torch.bfloat16)
            with run_engine(folder, make_settings(dtype="bfloat16", kv_cache_dtype=cache)) as llm:
                config = llm.llm_engine.vllm_config.cache_config
                capacities[name] = config.num_gpu_blocks * config.block_size
                answers = answer_all(llm, PROMPTS)
            if cache == "fp8":
                assert measure_differences(*load_weights(folder), PROMPTS, answers)[0] < self.LIMIT
        tolerance = 0.005  # whole blocks
        assert capacities["two"] / capacities["teacher"] == pytest.approx(1 / 0.75, rel=tolerance)
        assert capacities["four"] / capacities["teacher"] == pytest.approx(1 / 0.625, rel=tolerance)
        assert capacities["two in fp8"] / capacities["teacher"] == pytest.approx(1 / 0.375, rel=tolerance)


def read_kv_scales(model: Any) -> dict[str, tuple[float, float]]:
    """Runs in the worker: scales of keys and values by the layer's name."""
    layers = [module for module in model.modules() if hasattr(module, "_k_scale_float")]
    return {layer.layer_name: (layer._k_scale_float, layer._v_scale_float) for layer in layers}


def forget_reader_scales(model: Any) -> None:
    """Runs in the worker: the later layers read as if there were no scales."""
    for layer in model.model.layers[3:]:
        layer.self_attn.attn._k_scale_float = layer.self_attn.attn._v_scale_float = 1.0


class TestAdapters:
    """LoRA on the first layers, which run for every token.

    All slots that were asked for are taken: on a CPU the verifier adds one that stays empty, because vLLM's CPU kernels
    give requests without an adapter that of the last slot (row -1 of a table; its GPU kernels leave them out).
    """

    @pytest.fixture(scope="class")
    def engine(self, student: Path) -> Iterator[Any]:
        with run_engine(student, make_settings(max_loras=2)) as llm:
            yield llm

    def test_adapters_and_the_model_itself_in_one_batch_give_the_merged_models_tokens(
        self, engine: Any, student: Path, tmp_path: Path
    ) -> None:
        from vllm.lora.request import LoRARequest

        config, weights = load_weights(student)
        folders = [
            write_adapter(tmp_path / "all", weights, layers=(0, 1, 2), seed=1),
            write_adapter(tmp_path / "some", weights, (1,), ("self_attn.v_proj", "mlp.down_proj"), rank=8, seed=2),
        ]
        requests = [LoRARequest(folder.name, index + 1, str(folder)) for index, folder in enumerate(folders)]
        models = [weights, *(merge_adapter(weights, folder) for folder in folders)]
        prompts = [prompt for prompt in PROMPTS for _ in models]
        answers = answer_all(engine, prompts, adapters=[None, *requests] * len(PROMPTS))
        assert len({tuple(answer.tokens) for answer in answers[:3]}) == 3, "or the adapters change nothing"
        for index, merged in enumerate(models):
            assert_same(config, merged, PROMPTS, answers[index :: len(models)])

    def test_an_adapter_of_a_later_layer_is_refused_by_name(self, engine: Any, student: Path, tmp_path: Path) -> None:
        from vllm.lora.request import LoRARequest

        config, weights = load_weights(student)
        for index, projection in enumerate(("self_attn.o_proj", "mlp.up_proj")):
            folder = write_adapter(tmp_path / str(index), weights, (2, 4), (projection,))
            with pytest.raises(Exception, match=rf"model\.layers\.4\.{re.escape(projection)}\.no_adapter_past"):
                engine.llm_engine.add_lora(LoRARequest(f"late {index}", 10 + index, str(folder)))
        assert not {10, 11} & set(engine.llm_engine.list_loras())
        assert_same(config, weights, PROMPTS[:3], answer_all(engine, PROMPTS[:3]))


class TestSpeculation:
    """Tokens guessed from n-grams: several rows of a request are sampled from in one step."""

    @pytest.fixture(scope="class")
    def engine(self, student: Path) -> Iterator[Any]:
        with run_engine(student, make_settings(num_ngram_tokens=3)) as llm:
            yield llm

    def test_guessed_tokens_are_accepted_and_change_nothing(self, engine: Any, student: Path) -> None:
        config, weights = load_weights(student)
        phrases = [random_prompt_ids(random.Random(seed), 6) for seed in range(4)]
        prompts = [[*(phrase * 12), *phrase[:3]] for phrase in phrases] + PROMPTS
        accepted = read_counter(engine, "vllm:spec_decode_num_accepted_tokens")
        answers = answer_all(engine, prompts, new_tokens=40)
        assert_same(config, weights, prompts, answers, new_tokens=40)
        assert read_counter(engine, "vllm:spec_decode_num_accepted_tokens") > accepted

    def test_log_probabilities_of_prompts_are_refused_and_the_engine_lives_on(self, engine: Any, student: Path) -> None:
        assert_prompt_logprobs_are_refused(engine)
        assert_same(*load_weights(student), PROMPTS[:2], answer_all(engine, PROMPTS[:2]))


def assert_prompt_logprobs_are_refused(llm: Any) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    for number in (0, 1):
        parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=number)
        with pytest.raises(VLLMValidationError, match="prompt_logprobs cannot be given"):
            llm.generate([{"prompt_token_ids": PROMPTS[2]}], parameters, use_tqdm=False)


class TestLittleMemory:
    """One engine with a tokenizer and eight blocks of KV."""

    @pytest.fixture(scope="class")
    def engine(self, student: Path) -> Iterator[Any]:
        settings = make_settings(kv_cache_gib=0.003)  # a token takes 6 caches x 2 x 2 heads x 32 x 4 bytes
        with run_engine(student, settings) as llm:
            cache = llm.llm_engine.vllm_config.cache_config
            assert (cache.num_gpu_blocks, cache.block_size) == (8, 128)
            yield llm

    def test_preempted_requests_are_computed_again_to_the_same_tokens(self, engine: Any, student: Path) -> None:
        prompts = [random_prompt_ids(random.Random(seed), 100 + seed) for seed in range(8)]
        preempted = read_counter(engine, "vllm:num_preemptions")
        answers = answer_all(engine, prompts, new_tokens=60)
        assert read_counter(engine, "vllm:num_preemptions") - preempted >= 2
        assert_same(*load_weights(student), prompts, answers, new_tokens=60)

    def test_task_answers_end_at_the_end_token_and_come_in_order(self, engine: Any, student: Path) -> None:
        tokenizer, texts = load_tokenizer(student), ["ab", "some words", "other text that is longer", "ab"]
        plain = [generate_greedy(*load_weights(student), list(text.encode()), 8) for text in texts]
        # The third token of the first answer ends an answer; the model knows nothing of it.
        end = plain[0][2]
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        assert len({end in row for row in plain}) == 2, "one that ends and one that does not"
        expected = [
            tokenizer.decode(row[: row.index(end)] if end in row else row, skip_special_tokens=True) for row in plain
        ]
        assert generate_answers(engine, tokenizer, texts, 8) == expected

    def test_log_probabilities_of_prompts_are_refused_and_of_sampled_tokens_right(
        self, engine: Any, student: Path
    ) -> None:
        from vllm import SamplingParams

        assert_prompt_logprobs_are_refused(engine)
        config, weights = load_weights(student)
        parameters = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True, logprobs=5)
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], parameters, use_tqdm=False)
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            tokens = list(output.outputs[0].token_ids)
            expected_AV = compute_log_probs(config, weights, prompt, tokens)
            for expected_V, known in zip(expected_AV, output.outputs[0].logprobs, strict=True):
                assert set(expected_V.topk(5).indices.tolist()) <= set(known)
                assert all(abs(expected_V[token] - entry.logprob) < ROUNDING for token, entry in known.items())
        best = [generate_greedy(config, weights, prompt, 20) for prompt in PROMPTS]
        assert best != [list(output.outputs[0].token_ids) for output in outputs], "or nothing was sampled"

    def test_answers_keep_to_a_grammar(self, engine: Any) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        pattern, choices = r"[0-9]{3}-[a-f]{2,4}", ["yes", "no", "perhaps"]
        grammars = [
            SamplingParams(temperature=0, max_tokens=30, structured_outputs=StructuredOutputsParams(**grammar))
            for grammar in ({"regex": pattern}, {"choice": choices})
        ]
        requests = [{"prompt_token_ids": prompt} for prompt in PROMPTS for _ in grammars]
        outputs = engine.generate(requests, grammars * len(PROMPTS), use_tqdm=False)
        texts = [output.outputs[0].text for output in outputs]
        assert all(re.fullmatch(pattern, text) for text in texts[::2]), texts
        assert set(texts[1::2]) <= set(choices), texts


class TestTensorParallelism:
    """Two processes that share every layer; with one KV head, each has a copy of it."""

    @pytest.mark.parametrize("kv_heads", [2, pytest.param(1, marks=pytest.mark.soak)])
    def test_two_processes_give_the_reference_tokens(self, tmp_path: Path, kv_heads: int) -> None:
        shape = TinyShape(num_key_value_heads=kv_heads)
        folder = write_student(tmp_path, shape, key_value_group_size=3, family="qwen3", attention_bias=True)
        with run_engine(folder, make_settings(tensor_parallel_size=2, cpu_cores="0|1")) as llm:
            heads = llm.apply_model(read_heads)
            answers = answer_all(llm, PROMPTS)
        assert heads == [(2, 1), (2, 1)], "query and KV heads of a process"
        assert_same(*load_weights(folder), PROMPTS, answers)


def read_heads(model: Any) -> tuple[int, int]:
    """Runs in the worker."""
    reader = model.model.layers[-1].self_attn.attn
    return reader.num_heads, reader.num_kv_heads
