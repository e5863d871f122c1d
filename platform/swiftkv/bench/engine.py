"""Teacher against student in the same engine: prompt tokens/s, TTFT and TPOT as ratios of interleaved pairs.

Both engines are alive at once and take turns, so that a slow moment of the machine hits both. Does not go
through HTTP.
Called by: cli/bench.py, examples/quickstart.
Calls: engine/llm.py; model/convert.py for the random-weight models.
"""

import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swiftkv.engine.llm import generate_greedy, generate_tokens, run_engine
from swiftkv.engine.settings import EngineSettings
from swiftkv.spec import ModelShape, SwiftKVSpec

Prompts = Sequence[Sequence[int]]
OnStage = Callable[[str], None]

BENCH_SHAPE = ModelShape(
    hidden_size=1536,
    intermediate_size=4096,
    num_hidden_layers=16,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=128,
    vocab_size=8192,
    tie_word_embeddings=True,
)
"""About 415 million parameters: big enough that linear layers dominate, small enough for two CPU cores."""


@dataclass(frozen=True)
class EnginePass:
    """One engine's medians over the prompts of one pass, one prompt at a time."""

    prompt_tokens_per_s: float
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True)
class PairedResult:
    """Medians over all pairs, and the medians of the pairs' own ratios."""

    teacher: EnginePass
    student: EnginePass
    prompt_speedup: float
    """Student's prompt tokens/s over the teacher's."""
    ttft_ratio: float
    """Student's over the teacher's."""
    tpot_ratio: float
    """Student's over the teacher's."""
    prompt_speedups: list[float]
    """Of each pair."""


def measure_pairs(
    teacher: Path,
    student: Path,
    prompts: Prompts,
    new_tokens: int,
    num_pairs: int,
    settings: EngineSettings,
    on_stage: OnStage,
) -> PairedResult:
    """Start both engines and let them take turns on the same prompts."""
    with ExitStack() as stack:
        on_stage("starting the teacher's engine")
        teacher_llm = stack.enter_context(run_engine(teacher, settings))
        on_stage("starting the student's engine")
        student_llm = stack.enter_context(run_engine(student, settings))
        for llm in (teacher_llm, student_llm):
            _measure_pass(llm, prompts[:1], new_tokens)  # first use of a shape is slower
        pairs = []
        for index in range(num_pairs):
            on_stage(f"pair {index + 1} of {num_pairs}")
            pairs.append(tuple(_measure_pass(llm, prompts, new_tokens) for llm in (teacher_llm, student_llm)))
    speedups = [student.prompt_tokens_per_s / teacher.prompt_tokens_per_s for teacher, student in pairs]
    return PairedResult(
        teacher=_take_medians([pair[0] for pair in pairs]),
        student=_take_medians([pair[1] for pair in pairs]),
        prompt_speedup=statistics.median(speedups),
        ttft_ratio=statistics.median(student.ttft_s / teacher.ttft_s for teacher, student in pairs),
        tpot_ratio=statistics.median(student.tpot_s / teacher.tpot_s for teacher, student in pairs),
        prompt_speedups=speedups,
    )


def summarise(result: PairedResult, spec: SwiftKVSpec, prompt_tokens: int, settings: EngineSettings) -> dict[str, Any]:
    """The figures of a comparison as one flat JSON object."""
    flop_speedup = spec.compute_prefill_speedup(prompt_tokens)
    cores = settings.cpu_cores or "as vLLM chooses: one is kept for its own processes"
    figures: dict[str, Any] = {"hardware": describe_hardware(), "engine_cores": cores, "prompt_tokens": prompt_tokens}
    for name, entry in (("teacher", result.teacher), ("student", result.student)):
        figures |= {f"{name}_{field}": round(value, 5) for field, value in vars(entry).items()}
    return figures | {
        "speedup": round(result.prompt_speedup, 4),
        "flop_speedup": round(flop_speedup, 4),
        "speedup_over_flop_speedup": round(result.prompt_speedup / flop_speedup, 4),
        "ttft_ratio": round(result.ttft_ratio, 4),
        "tpot_ratio": round(result.tpot_ratio, 4),
        "speedup_of_each_pair": [round(value, 4) for value in result.prompt_speedups],
        "dtype": settings.dtype,
        "eager": settings.is_eager(),
    }


def describe_hardware() -> str:
    """The machine as reports name it."""
    return f"{len(os.sched_getaffinity(0))} CPU cores"


def check_skipping(student: Path, prompts: Prompts, new_tokens: int, settings: EngineSettings) -> bool:
    """Whether the student gives the same greedy tokens with and without skipping, in one batch of all prompts."""
    tokens = []
    for skipping in (True, False):
        with run_engine(student, settings.model_copy(update={"skipping": skipping})) as llm:
            tokens.append(generate_tokens(llm, prompts, new_tokens))
    return tokens[0] == tokens[1]


def write_random_models(folder: Path, shape: ModelShape, max_tokens: int, seed: int = 0) -> SwiftKVSpec:
    """A random teacher and its student with half the layers skipped, as `teacher` and `student` in `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from swiftkv.model.checkpoint import save_student
    from swiftkv.model.convert import convert_teacher

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tie_word_embeddings,
        max_position_embeddings=max_tokens,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "teacher")
    kept = shape.num_hidden_layers // 2
    student = convert_teacher(folder / "teacher", kept, dtype=torch.bfloat16)
    save_student(student, folder / "student")
    return SwiftKVSpec(shape, kept)


def build_random_prompts(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """One prompt of random tokens per length."""
    import numpy as np

    generator = np.random.default_rng(seed)
    return [generator.integers(3, vocab_size, length).tolist() for length in lengths]


def _measure_pass(llm: Any, prompts: Prompts, new_tokens: int) -> EnginePass:
    passes = []
    for prompt in prompts:
        metrics = generate_greedy(llm, [prompt], new_tokens)[0].metrics
        ttft_s = metrics.first_token_latency
        decode_s = metrics.last_token_ts - metrics.first_token_ts
        passes.append(EnginePass(len(prompt) / ttft_s, ttft_s, decode_s / max(1, new_tokens - 1)))
    return _take_medians(passes)


def _take_medians(passes: Sequence[EnginePass]) -> EnginePass:
    return EnginePass(
        statistics.median(entry.prompt_tokens_per_s for entry in passes),
        statistics.median(entry.ttft_s for entry in passes),
        statistics.median(entry.tpot_s for entry in passes),
    )
