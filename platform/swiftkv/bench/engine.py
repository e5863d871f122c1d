"""The engine bench: a SwiftKV model against its unmodified teacher in vLLM, row by row of bench/table.py.

Random weights; every ratio from passes that took turns in one run, or counted where nothing is timed.
Called by: cli/bench.py.
Calls: bench/pairs.py, bench/models.py, engine/llm.py.
"""

import os
import statistics
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from swiftkv.bench.file_cache import count_resident_bytes, drop_from_memory, list_wanted_runs
from swiftkv.bench.models import (
    EIGHT_LAYER_SHAPE,
    LAPTOP_SHAPE,
    LLAMA_8B_SHAPE,
    NARROW_8B_SHAPE,
    Prompts,
    build_random_prompts,
    write_random_models,
)
from swiftkv.bench.pairs import (
    OnStage,
    describe_machine,
    measure_load,
    measure_pass,
    pair_up,
    summarise,
    take_turns,
)
from swiftkv.bench.ratios import compute_ratio
from swiftkv.bench.table import ROWS, Result
from swiftkv.engine.llm import PREFILL_ONLY, generate_tokens, run_engine
from swiftkv.engine.settings import EngineSettings
from swiftkv.engine.weights import list_tensor_files
from swiftkv.model.precision import has_bfloat16_instructions
from swiftkv.spec import ModelShape, SwiftKVSpec

_ROWS = {row.name: row for row in ROWS}
_LOAD_ROWS = {"throughput", "ttft"}
_CHECK_LENGTHS = (1, 7, 64, 250, 600)
_CHECK_NEW_TOKENS = 8


@dataclass(frozen=True)
class Plan:
    """Sizes of one run of the bench."""

    shape: ModelShape
    prompt_tokens: int = 2000
    """Of one prompt at a time."""
    new_tokens: int = 17
    """Decoded after each of these prompts."""
    pairs: int = 5
    load_prompt_tokens: int = 1000
    load_requests: int = 16
    tpot_tokens: int = 65
    tpot_rounds: int = 9
    kv_cache_gib: float = 2.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    cpu_cores: str | None = None
    """That the engines compute on, in turns."""

    @property
    def settings(self) -> EngineSettings:
        """The same for teacher and student in every timed row."""
        context = max(self.prompt_tokens + self.new_tokens, self.load_prompt_tokens * 11 // 10)
        return EngineSettings(
            dtype=self.dtype,
            max_model_len=context,
            max_num_batched_tokens=max(8192, context),  # vLLM's own default for servers on large GPUs
            max_num_seqs=self.load_requests,
            enable_prefix_caching=False,
            kv_cache_gib=self.kv_cache_gib,
            cpu_cores=self.cpu_cores,
        )


GPU = Plan(LLAMA_8B_SHAPE, kv_cache_gib=16.0)


def plan_for_cpu() -> Plan:
    """On all cores; in bfloat16 where the CPU computes in it, else in float32: emulated, it is several times slower."""
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    return Plan(LAPTOP_SHAPE, dtype="bfloat16" if has_bfloat16_instructions() else "float32", cpu_cores=cores)


def check_skipping(student: Path, prompts: Prompts, new_tokens: int, settings: EngineSettings) -> bool:
    """Whether the student gives the same greedy tokens with and without skipping, in one batch of all prompts."""
    tokens = []
    for skipping in (True, False):
        with run_engine(student, settings.model_copy(update={"skipping": skipping})) as llm:
            tokens.append(generate_tokens(llm, prompts, new_tokens))
    return tokens[0] == tokens[1]


class Bench:
    """Measures rows by name; models are written to `folder` when the first row that needs them is measured."""

    def __init__(self, plan: Plan, folder: Path, on_stage: OnStage) -> None:
        self.plan, self.folder, self.on_stage = plan, folder, on_stage
        self.figures: dict[str, Any] = describe_machine(plan.settings)
        """More about what was measured, as a flat JSON object."""

    def measure_rows(self, names: Collection[str]) -> list[Result]:
        """The rows named, in the table's order."""
        results = self.measure_speed(names)
        if any(name.startswith("kv-") for name in names):
            results += self.count_kv_tokens()
        if "prefill-half-weights" in names:
            results.append(self.weigh_prefill_half())
        if "prefill-half-speed" in names:
            results.append(self.measure_prefill_half())
        return [result for result in results if result.row.name in names]

    def measure_speed(self, names: Collection[str]) -> list[Result]:
        """Rows that time teacher and student, with two engines (four for TPOT) alive at once."""
        results: list[Result] = []
        if not {"prefill", "tpot", *_LOAD_ROWS} & set(names):
            return results
        models, spec = self._write_models(self.plan.shape)
        with ExitStack() as stack:
            compiled = [self._start(stack, models / who, who) for who in ("teacher", "student")]
            if "prefill" in names:
                results.append(self._measure_prefill(compiled, spec))
            if _LOAD_ROWS & set(names):
                results += self._measure_load(compiled, is_warm="prefill" in names)
            if "tpot" in names:
                eager = [
                    self._start(stack, models / who, f"{who}, eager", eager=True) for who in ("teacher", "student")
                ]
                results.append(self._measure_tpot([*compiled, *eager]))
        return results

    def check_tokens(self) -> bool:
        """Whether the model that was timed answers the same with and without skipping, in float32, eager."""
        self.on_stage("the student with and without skipping, float32, eager")
        models, spec = self._write_models(self.plan.shape)
        update = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024}
        prompts = build_random_prompts(_CHECK_LENGTHS, spec.shape.vocab_size)
        settings = self.plan.settings.model_copy(update=update)
        same = check_skipping(models / "student", prompts, _CHECK_NEW_TOKENS, settings)
        self.figures["same_tokens_with_and_without_skipping"] = same
        return same

    def count_kv_tokens(self) -> list[Result]:
        """Tokens that vLLM says fit the same KV cache memory."""
        models, _ = self._write_models(EIGHT_LAYER_SHAPE, group_sizes=(2, 4))
        # A budget that the KV of every one of them divides: blocks that do not fit are no part of the comparison.
        settings = EngineSettings(dtype="bfloat16", enforce_eager=True, max_model_len=1024, kv_cache_gib=240 / 1024)
        fits = {}
        for who, dtype in (("teacher", "auto"), ("student-2", "auto"), ("student-4", "auto"), ("student-2", "fp8")):
            self.on_stage(f"counting the KV tokens of {who}, {dtype}")
            with run_engine(models / who, settings.model_copy(update={"kv_cache_dtype": dtype})) as llm:
                cache = llm.llm_engine.vllm_config.cache_config
                fits[who, dtype] = cache.num_gpu_blocks * cache.block_size
        teacher = fits["teacher", "auto"]
        rows = {"kv-group-2": ("student-2", "auto"), "kv-group-4": ("student-4", "auto")}
        rows["kv-group-2-fp8"] = ("student-2", "fp8")
        return [_count(name, fits[key], teacher, "tokens") for name, key in rows.items()]

    def weigh_prefill_half(self) -> Result:
        """Bytes of the tensors that each role loads, and, as figures, those that each reads of a cold checkpoint."""
        narrow, _ = self._write_models(NARROW_8B_SHAPE)
        half, whole = (
            sum(run.end - run.start for run in list_wanted_runs(narrow / "student", prefill_only))
            for prefill_only in (True, False)
        )
        models, _ = self._write_models(self.plan.shape)
        files = list_tensor_files(models / "student")
        self.figures["checkpoint_bytes"] = sum(file.stat().st_size for file in files)
        for role, transfer in (("prefill", "producer"), ("full", "none")):
            self.on_stage(f"reading a cold checkpoint, role {role}")
            drop_from_memory(files)
            update = {"role": role, "kv_transfer": transfer, "enforce_eager": True}
            with run_engine(models / "student", self.plan.settings.model_copy(update=update)):
                self.figures[f"{role}_bytes_read_of_cold_checkpoint"] = count_resident_bytes(files)
        return _count("prefill-half-weights", half, whole, "bytes")

    def measure_prefill_half(self) -> Result:
        """Both roles as NIXL producers, on the same prompts."""
        models, spec = self._write_models(self.plan.shape)
        prompts = build_random_prompts([self.plan.prompt_tokens], spec.shape.vocab_size)
        # KV that nobody fetches is kept for a while: the cache has room for that of all passes.
        settings = self.plan.settings.model_copy(update={"kv_transfer": "producer"})
        with ExitStack() as stack:
            engines = []
            for role in ("full", "prefill"):
                self.on_stage(f"starting the role {role}")
                update = {"role": role}
                engines.append(stack.enter_context(run_engine(models / "student", settings.model_copy(update=update))))
            measures = [
                lambda llm=llm: measure_pass(llm, prompts, 1, [PREFILL_ONLY]).prompt_tokens_per_s for llm in engines
            ]
            whole, half = take_turns(measures, self.plan.pairs, self.on_stage, "prefill half")
        return _compare("prefill-half-speed", half, whole, "tokens/s")

    def _measure_prefill(self, engines: Sequence[Any], spec: SwiftKVSpec) -> Result:
        prompts = build_random_prompts([self.plan.prompt_tokens], spec.shape.vocab_size)
        measures = [lambda llm=llm: measure_pass(llm, prompts, self.plan.new_tokens) for llm in engines]
        result = pair_up(*take_turns(measures, self.plan.pairs, self.on_stage, "prefill"))
        self.figures |= summarise(result, spec, self.plan.prompt_tokens, self.plan.settings)
        allowed = 1 / spec.compute_prefill_speedup(self.plan.prompt_tokens)
        ratio = result.prompt_tokens_per_s.scale(allowed)
        speeds = [f"{entry.prompt_tokens_per_s:,.0f} tokens/s" for entry in (result.teacher, result.student)]
        return Result(_ROWS["prefill"], ratio, *speeds)

    def _measure_load(self, engines: Sequence[Any], is_warm: bool) -> list[Result]:
        plan = self.plan
        prompts = build_random_prompts([plan.load_prompt_tokens] * plan.load_requests, plan.shape.vocab_size)
        measures = [lambda llm=llm: measure_load(llm, prompts, plan.load_prompt_tokens // 10) for llm in engines]
        teacher, student = take_turns(measures, plan.pairs, self.on_stage, "load", is_warm=is_warm)
        return [
            _compare("throughput", [p.tokens_per_s for p in student], [p.tokens_per_s for p in teacher], "tokens/s"),
            _compare("ttft", [p.ttft_s for p in student], [p.ttft_s for p in teacher], "s"),
        ]

    def _measure_tpot(self, engines: Sequence[Any]) -> Result:
        """Compiled and eager, teacher and student, all in turns; each side in whichever is faster for it."""
        plan = self.plan
        prompts = build_random_prompts([64], plan.shape.vocab_size)
        measures = [lambda llm=llm: measure_pass(llm, prompts, plan.tpot_tokens).tpot_s * 1e3 for llm in engines]
        passes = take_turns(measures, plan.tpot_rounds, self.on_stage, "TPOT")
        medians = [statistics.median(values) for values in passes]
        for index, name in enumerate(("teacher", "student")):
            self.figures[f"{name}_tpot_compiled_ms"] = round(medians[index], 5)
            self.figures[f"{name}_tpot_eager_ms"] = round(medians[index + 2], 5)
        teacher, student = (passes[i if medians[i] <= medians[i + 2] else i + 2] for i in (0, 1))
        return _compare("tpot", student, teacher, "ms")

    def _start(self, stack: ExitStack, folder: Path, title: str, eager: bool | None = None) -> Any:
        self.on_stage(f"starting the engine: {title}")
        return stack.enter_context(run_engine(folder, self.plan.settings.model_copy(update={"enforce_eager": eager})))

    def _write_models(self, shape: ModelShape, group_sizes: Sequence[int] = (1,)) -> tuple[Path, SwiftKVSpec]:
        folder = self.folder / f"{shape.hidden_size}-{shape.num_hidden_layers}"
        if not folder.exists():
            self.on_stage(f"writing random models of {shape.num_hidden_layers} layers")
            write_random_models(folder, shape, max(self.plan.settings.max_model_len or 0, 1024), group_sizes)
        return folder, SwiftKVSpec(shape, shape.num_hidden_layers // 2, group_sizes[0])


def _compare(name: str, student: Sequence[float], teacher: Sequence[float], unit: str) -> Result:
    medians = [f"{statistics.median(values):,.4g} {unit}" for values in (teacher, student)]
    return Result(_ROWS[name], compute_ratio(student, teacher), *medians)


def _count(name: str, student: int, teacher: int, unit: str) -> Result:
    return Result(_ROWS[name], compute_ratio([student], [teacher]), f"{teacher:,} {unit}", f"{student:,} {unit}")
