"""The distillation bench on a tiny model: what it counts, and that it refuses sides that do not agree."""

import pytest
import torch

from swiftkv.bench import distill
from swiftkv.bench.distill import DistillPlan, DistillStep, measure_distillation
from swiftkv.distill.step import Batch
from swiftkv.errors import EngineError
from swiftkv.model.states import LaterStates
from swiftkv.spec import ModelShape

SHAPE = ModelShape(64, 224, 8, 4, 2, 16, 96)
PLAN = DistillPlan(SHAPE, row_tokens=64, answer_tokens=8, pairs=1)


@pytest.fixture
def small_8b(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "LLAMA_8B_SHAPE", SHAPE)


@pytest.mark.usefixtures("small_8b")
def test_every_figure_is_there_and_shapes_count_as_real_tensors_do() -> None:
    results, figures = measure_distillation(PLAN, lambda _: None)
    assert [result.row.name for result in results] == [
        "speedup",
        "speedup-answers-only",
        "memory",
        "packing",
        "weak-scaling",
    ]
    assert figures["packed_used_frac"] > 2 * figures["padded_used_frac"] > 0
    assert results[3].ratio.median > 1 and results[4].ratio.median > 0
    for key in ("speedup", "speedup_answers_only"):
        assert figures[key] > 0
        # Without memory, attention is counted as matrix products, whose backward recomputes nothing.
        assert figures[f"flop_{key}_8b"] == pytest.approx(figures[f"flop_{key}"], rel=0.02)
    # The reference's first half runs twice, ours once; the later halves and the backward pass are the same.
    assert 1.1 < figures["flop_speedup"] < 1.3
    # And of the teacher's last layer only what the answers need.
    assert 2.0 < figures["flop_speedup_answers_only"] < 2.5
    memory = results[2].ratio.median
    assert 0.05 < memory < 0.6


@pytest.mark.usefixtures("small_8b")
def test_sides_with_another_loss_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run_halves = DistillStep.run_halves

    def run_wrongly(self: DistillStep, batch: Batch) -> tuple[LaterStates, LaterStates]:
        teacher, student = run_halves(self, batch)
        return teacher, LaterStates(torch.zeros_like(student.last_BTD), student.penultimate_BTD)

    monkeypatch.setattr(distill.DistillStep, "run_halves", run_wrongly)
    with pytest.raises(EngineError, match="the losses differ"):
        measure_distillation(PLAN, lambda _: None)
