"""The engine bench's figures and models, without an engine (scripts/smoke_engine.py starts one on them)."""

from pathlib import Path

import pytest
import torch
from reference import load_weights

from swiftkv.bench.engine import (
    BENCH_SHAPE,
    EnginePass,
    PairedResult,
    build_random_prompts,
    summarise,
    write_random_models,
)
from swiftkv.engine.settings import EngineSettings
from swiftkv.spec import ModelShape, SwiftKVSpec

RESULT = PairedResult(
    teacher=EnginePass(400.0, 5.0, 0.04),
    student=EnginePass(740.0, 2.7, 0.05),
    prompt_speedup=1.85,
    ttft_ratio=0.54,
    tpot_ratio=1.25,
    prompt_speedups=[1.8, 1.85, 1.9],
)


def test_figures_have_the_promised_keys() -> None:
    figures = summarise(RESULT, SwiftKVSpec(BENCH_SHAPE, 8), 2000, EngineSettings(enforce_eager=True))
    assert figures["teacher_prompt_tokens_per_s"] == 400 and figures["student_prompt_tokens_per_s"] == 740
    assert figures["speedup"] == 1.85
    assert figures["flop_speedup"] == pytest.approx(1.89, abs=0.005)
    assert figures["speedup_over_flop_speedup"] == pytest.approx(1.85 / figures["flop_speedup"], abs=1e-4)


def test_the_bench_model_has_about_400_million_parameters() -> None:
    assert SwiftKVSpec(BENCH_SHAPE, 16).compute_weight_bytes(1) == pytest.approx(400e6, rel=0.1)


def test_random_models_are_a_teacher_and_its_student_in_bfloat16(tmp_path: Path) -> None:
    spec = write_random_models(tmp_path, ModelShape(64, 128, 4, 2, 1, 32, 512), max_tokens=128)
    assert spec.num_key_value_layers == 2
    _, teacher = load_weights(tmp_path / "teacher")
    config, student = load_weights(tmp_path / "student")
    assert config["model_type"] == "llama_swiftkv" and config["dtype"] == "bfloat16"
    assert all(torch.equal(tensor, student[name]) for name, tensor in teacher.items())
    assert build_random_prompts([3, 5], 512) == build_random_prompts([3, 5], 512)
