"""Held-out figures against the independent reference."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import random_prompt_ids, write_student, write_teacher
from reference import compute_logits, load_weights

from swiftkv.errors import CheckpointError
from swiftkv.evaluate.compare import compare_with_teacher, split_batches
from swiftkv.model.checkpoint import load_student
from swiftkv.model.convert import convert_teacher

ROWS = np.array([random_prompt_ids(random.Random(seed), 40) for seed in range(5)], dtype=np.int32)


def test_figures_equal_the_reference(tmp_path: Path) -> None:
    folder = write_student(tmp_path)
    config, weights = load_weights(folder)
    teacher, student = (
        torch.stack([compute_logits(config, weights, row.tolist(), mode=mode).log_softmax(-1) for row in ROWS])[:, :-1]
        for mode in ("teacher", "student")
    )
    targets = torch.from_numpy(ROWS[:, 1:].astype(np.int64))[..., None]
    comparison = compare_with_teacher(load_student(folder), [ROWS[:2], ROWS[2:]])
    assert comparison.positions == 5 * 39
    assert comparison.teacher_perplexity == pytest.approx(math.exp(-teacher.gather(-1, targets).mean()), rel=1e-4)
    assert comparison.student_perplexity == pytest.approx(math.exp(-student.gather(-1, targets).mean()), rel=1e-4)
    agreement = (teacher.argmax(-1) == student.argmax(-1)).float().mean()
    assert comparison.agreement_frac == pytest.approx(float(agreement), abs=1e-6)
    assert comparison.kl_nats == pytest.approx(float((teacher.exp() * (teacher - student)).sum(-1).mean()), rel=1e-4)
    assert 0 < comparison.agreement_frac < 1, "the fake must not make this trivial"


def test_a_student_that_skips_nothing_agrees_with_its_teacher(tmp_path: Path) -> None:
    model = convert_teacher(write_teacher(tmp_path), num_key_value_layers=6)
    comparison = compare_with_teacher(model, split_batches(ROWS, 300))
    assert comparison.agreement_frac == 1.0 and comparison.kl_nats == pytest.approx(0, abs=1e-7)


def test_without_a_teacher_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    stripped = load_student(write_student(tmp_path, keep_teacher_projections=False))
    with pytest.raises(CheckpointError, match="has no teacher"):
        compare_with_teacher(stripped, split_batches(ROWS, 300))
