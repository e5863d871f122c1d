"""Turns, pairs and figures of the bench, without an engine (scripts/smoke_engine.py starts one on its models)."""

from pathlib import Path

import pytest
import torch
from reference import load_weights

from swiftkv.bench.models import (
    LAPTOP_SHAPE,
    LLAMA_8B_SHAPE,
    NARROW_8B_SHAPE,
    build_random_prompts,
    write_random_models,
)
from swiftkv.bench.pairs import EnginePass, pair_up, summarise, take_turns
from swiftkv.engine.settings import EngineSettings
from swiftkv.spec import ModelShape, SwiftKVSpec

TEACHER = [EnginePass(400.0, 5.0, 0.04), EnginePass(200.0, 10.0, 0.08)]
STUDENT = [EnginePass(740.0, 2.7, 0.05), EnginePass(360.0, 5.5, 0.10)]


def test_figures_are_those_of_pairs() -> None:
    spec = SwiftKVSpec(LAPTOP_SHAPE, 6)
    figures = summarise(pair_up(TEACHER, STUDENT), spec, 2000, EngineSettings(enforce_eager=True))
    assert figures["teacher_prompt_tokens_per_s"] == 300 and figures["speedup"] == pytest.approx((1.85 + 1.8) / 2)
    assert figures["tpot_ratio"] == 1.25
    assert figures["flop_speedup"] == pytest.approx(1.932, abs=0.005)
    assert figures["speedup_over_flop_speedup"] == pytest.approx(1.825 / figures["flop_speedup"], abs=1e-3)


def test_executed_and_normalised_flops_differ_by_what_is_skipped() -> None:
    spec = SwiftKVSpec(LAPTOP_SHAPE, 6)
    figures = summarise(pair_up(TEACHER, STUDENT), spec, 2000, EngineSettings(enforce_eager=True))
    assert figures["teacher_executed_gflops_per_s"] == figures["teacher_normalised_gflops_per_s"]
    ratio = figures["student_normalised_gflops_per_s"] / figures["student_executed_gflops_per_s"]
    assert ratio == pytest.approx(figures["flop_speedup"], rel=1e-3)


def test_engines_take_turns_after_a_round_that_does_not_count() -> None:
    order: list[str] = []
    measures = [lambda name=name: order.append(name) or len(order) for name in "ab"]
    taken = take_turns(measures, 2, lambda _: None, "")
    assert "".join(order) == "ababab" and taken == [[3, 5], [4, 6]]


def test_the_shapes_are_what_they_are_called() -> None:
    assert SwiftKVSpec(LAPTOP_SHAPE, 12).compute_weight_bytes(1) == pytest.approx(400e6, rel=0.1)
    assert SwiftKVSpec(LLAMA_8B_SHAPE, 32).compute_weight_bytes(1) == pytest.approx(8.03e9, rel=0.005)
    narrow, wide = (shape.vocab_parameters / shape.mlp_parameters for shape in (NARROW_8B_SHAPE, LLAMA_8B_SHAPE))
    assert narrow == pytest.approx(wide, rel=0.01)


def test_random_models_are_a_teacher_and_its_students_in_bfloat16(tmp_path: Path) -> None:
    spec = write_random_models(tmp_path, ModelShape(64, 128, 4, 2, 1, 32, 512), max_tokens=128, group_sizes=(1, 2))
    assert spec.num_key_value_layers == 2
    _, teacher = load_weights(tmp_path / "teacher")
    for name, group_size in (("student", 1), ("student-2", 2)):
        config, student = load_weights(tmp_path / name)
        assert config["model_type"] == "llama_swiftkv" and config["dtype"] == "bfloat16"
        assert config["key_value_group_size"] == group_size
        assert all(torch.equal(tensor, student[name]) for name, tensor in teacher.items())
    assert build_random_prompts([3, 5], 512) == build_random_prompts([3, 5], 512)
