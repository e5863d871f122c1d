"""Teacher and student in the same engine settings, in turns, one request at a time or many at once.

Both engines are alive at once and take turns, so that a slow moment of the machine hits both. Does not go through
HTTP.
Called by: bench/engine.py, examples/quickstart.
Calls: engine/llm.py.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swiftkv.bench.models import Prompts
from swiftkv.bench.ratios import Ratio, compute_ratio
from swiftkv.engine.llm import KVTransfer, generate_greedy, run_engine
from swiftkv.engine.settings import EngineSettings
from swiftkv.model.precision import has_bfloat16_instructions
from swiftkv.spec import SwiftKVSpec

OnStage = Callable[[str], None]


@dataclass(frozen=True)
class EnginePass:
    """One engine's medians over the prompts of one pass, one prompt at a time."""

    prompt_tokens_per_s: float
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True)
class LoadPass:
    """One engine under many requests at once."""

    tokens_per_s: float
    """Prompt and completion tokens of all requests over the time that all took."""
    ttft_s: float
    """Mean over the requests, waiting for others included."""


@dataclass(frozen=True)
class PairedResult:
    """Medians over all pairs, and the student over the teacher."""

    teacher: EnginePass
    student: EnginePass
    prompt_tokens_per_s: Ratio
    ttft: Ratio
    tpot: Ratio


def measure_pairs(
    teacher: Path,
    student: Path,
    prompts: Prompts,
    new_tokens: int,
    num_pairs: int,
    settings: EngineSettings,
    on_stage: OnStage,
) -> PairedResult:
    """Start both engines and let them take turns on the same prompts, one at a time."""
    with ExitStack() as stack:
        on_stage("starting the teacher's engine")
        teacher_llm = stack.enter_context(run_engine(teacher, settings))
        on_stage("starting the student's engine")
        student_llm = stack.enter_context(run_engine(student, settings))
        measure = [lambda llm=llm: measure_pass(llm, prompts, new_tokens) for llm in (teacher_llm, student_llm)]
        return pair_up(*take_turns(measure, num_pairs, on_stage, "pair"))


def take_turns(
    measures: Sequence[Callable[[], Any]], num_rounds: int, on_stage: OnStage, title: str, is_warm: bool = False
) -> list[list[Any]]:
    """What each of `measures` gives in every round, after one that does not count unless the engines are warm.

    Returns: one list per measure, a value per round.
    """
    for measure in () if is_warm else measures:
        measure()  # the first use of an engine is slower
    taken: list[list[Any]] = [[] for _ in measures]
    for index in range(num_rounds):
        on_stage(f"{title} {index + 1} of {num_rounds}")
        for values, measure in zip(taken, measures, strict=True):
            values.append(measure())
    return taken


def pair_up(teacher: Sequence[EnginePass], student: Sequence[EnginePass]) -> PairedResult:
    """The student over the teacher, pass by pass."""
    return PairedResult(
        teacher=_take_medians(teacher),
        student=_take_medians(student),
        prompt_tokens_per_s=compute_ratio(
            [entry.prompt_tokens_per_s for entry in student], [entry.prompt_tokens_per_s for entry in teacher]
        ),
        ttft=compute_ratio([entry.ttft_s for entry in student], [entry.ttft_s for entry in teacher]),
        tpot=compute_ratio([entry.tpot_s for entry in student], [entry.tpot_s for entry in teacher]),
    )


def measure_pass(
    llm: Any, prompts: Prompts, new_tokens: int, transfers: Sequence[KVTransfer] | None = None
) -> EnginePass:
    """One pass over the prompts, one at a time; `transfers` as in `generate_greedy`."""
    passes = []
    for index, prompt in enumerate(prompts):
        transfer = None if transfers is None else [transfers[index]]
        metrics = generate_greedy(llm, [prompt], new_tokens, transfer)[0].metrics
        ttft_s = metrics.first_token_latency
        decode_s = metrics.last_token_ts - metrics.first_token_ts
        passes.append(EnginePass(len(prompt) / ttft_s, ttft_s, decode_s / max(1, new_tokens - 1)))
    return _take_medians(passes)


def measure_load(llm: Any, prompts: Prompts, new_tokens: int) -> LoadPass:
    """All prompts at once."""
    started = time.perf_counter()
    outputs = generate_greedy(llm, prompts, new_tokens)
    took_s = time.perf_counter() - started
    tokens = sum(len(prompt) + new_tokens for prompt in prompts)
    return LoadPass(tokens / took_s, statistics.fmean(output.metrics.first_token_latency for output in outputs))


def summarise(result: PairedResult, spec: SwiftKVSpec, prompt_tokens: int, settings: EngineSettings) -> dict[str, Any]:
    """The figures of a comparison as one flat JSON object.

    Executed FLOP/s are what the engine computed; normalised FLOP/s charge the teacher's FLOPs to every token, as the
    SwiftKV paper does. Both of one prompt at a time, without embeddings and LM head.
    """
    flop_speedup = spec.compute_prefill_speedup(prompt_tokens)
    teacher_flops = spec.teacher.compute_prompt_token_flops(prompt_tokens).total
    figures: dict[str, Any] = describe_machine(settings) | {"prompt_tokens": prompt_tokens}
    for name, entry in (("teacher", result.teacher), ("student", result.student)):
        figures |= {f"{name}_{field}": round(value, 5) for field, value in vars(entry).items()}
        executed = teacher_flops / (1 if name == "teacher" else flop_speedup)
        figures[f"{name}_executed_gflops_per_s"] = round(entry.prompt_tokens_per_s * executed / 1e9, 1)
        figures[f"{name}_normalised_gflops_per_s"] = round(entry.prompt_tokens_per_s * teacher_flops / 1e9, 1)
    speedup = result.prompt_tokens_per_s
    return figures | {
        "speedup": round(speedup.median, 4),
        "speedup_interval": [round(speedup.low, 4), round(speedup.high, 4)],
        "speedup_of_each_pair": [round(value, 4) for value in speedup.pairs],
        "flop_speedup": round(flop_speedup, 4),
        "speedup_over_flop_speedup": round(speedup.median / flop_speedup, 4),
        "ttft_ratio": round(result.ttft.median, 4),
        "tpot_ratio": round(result.tpot.median, 4),
        "dtype": settings.dtype,
        "eager": settings.is_eager(),
    }


def describe_machine(settings: EngineSettings) -> dict[str, str]:
    """The machine as reports name it, and what of it an engine computes on."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {"hardware": current_platform.get_device_name(), "engine_cores": "the GPU"}
    cores = settings.cpu_cores or "as vLLM chooses: one is kept for its own processes"
    return {"hardware": describe_processor(), "engine_cores": cores}


def describe_processor() -> str:
    """The CPU as reports name it."""
    bfloat16 = "with" if has_bfloat16_instructions() else "without"
    return f"{len(os.sched_getaffinity(0))} CPU cores {bfloat16} bfloat16 instructions"


def _take_medians(passes: Sequence[EnginePass]) -> EnginePass:
    return EnginePass(
        statistics.median(entry.prompt_tokens_per_s for entry in passes),
        statistics.median(entry.ttft_s for entry in passes),
        statistics.median(entry.tpot_s for entry in passes),
    )
