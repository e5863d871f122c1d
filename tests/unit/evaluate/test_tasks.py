"""Task scores against counts made by hand, comparisons against the independent reference.

Answers of a real engine: tests/integration/test_engine_settings.py.
"""

import math
from pathlib import Path
from typing import Any

import pytest
from fakes import write_student
from reference import compute_logits, load_weights

from swiftkv.errors import CheckpointError, DataError
from swiftkv.evaluate.tasks import (
    TaskScore,
    compare_answers,
    compare_matches,
    compute_rouge_l,
    generate_answers,
    score_answers,
)
from swiftkv.model.checkpoint import load_student, load_tokenizer


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("student"), key_value_group_size=2, num_key_value_layers=2)


def test_score_by_hand() -> None:
    given = [" SELECT a FROM t\n", "SELECT A FROM t", "SELECT a", "", "x y"]
    right = ["SELECT a FROM t", "SELECT a FROM t", "SELECT a FROM t", "z", "x y "]
    score = score_answers(given, [{"prompt": "?", "response": response} for response in right])
    assert score.matches == (True, False, False, False, True)
    assert (score.items, score.exact_match_frac) == (5, 2 / 5)
    assert score.rouge_l == pytest.approx((1 + 1 + 2 * 2 / (2 + 4) + 0 + 1) / 5)


@pytest.mark.parametrize(
    ("answer", "response", "expected"),
    [
        ("police killed the gunman", "police kill the gunman", 3 / 4),
        ("the gunman kill police", "police kill the gunman", 2 / 4),
        ("a x b y c", "a b c", 2 * 3 / (5 + 3)),
        ("A, b!", "a b", 1.0),
        ("a", "", 0.0),
        ("", "", 1.0),
        ("b a b a", "a b", 2 * 2 / (4 + 2)),
    ],
)
def test_rouge_l(answer: str, response: str, expected: float) -> None:
    assert compute_rouge_l(answer, response) == pytest.approx(expected)
    assert compute_rouge_l(response, answer) == pytest.approx(expected)


def test_paired_difference_by_hand() -> None:
    teacher, student = (
        TaskScore(4, sum(matches) / 4, 0.0, matches)
        for matches in ((True, True, True, False), (True, False, False, True))
    )
    difference = compare_matches(teacher, student)
    # Differences 0, -1, -1, 1: mean -1/4, squares around it 1/16 + 9/16 + 9/16 + 25/16.
    assert difference.difference_frac == -1 / 4
    assert difference.standard_error_frac == pytest.approx(math.sqrt(44 / 16 / 3 / 4))
    assert compare_matches(teacher, teacher).standard_error_frac == 0.0


def test_only_answer_positions_are_compared(student_folder: Path) -> None:
    config, weights = load_weights(student_folder)
    model, tokenizer = load_student(student_folder), load_tokenizer(student_folder)
    items = [
        {"prompt": "a longer question", "response": "yes"},
        {"prompt": "q", "response": "a longer answer, too"},
        {"prompt": "three", "response": ""},
    ]
    sums, positions = [0.0] * 4, 0
    for item in items:
        prompt = list(item["prompt"].encode())
        ids = [*prompt, *item["response"].encode(), tokenizer.eos_token_id]
        teacher, student = (
            compute_logits(config, weights, ids, mode=mode).log_softmax(-1) for mode in ("teacher", "student")
        )
        for place in range(len(prompt) - 1, len(ids) - 1):
            p, q, target = teacher[place], student[place], ids[place + 1]
            scores = (-p[target], -q[target], p.argmax() == q.argmax(), (p.exp() * (p - q)).sum())
            sums = [total + float(score) for total, score in zip(sums, scores, strict=True)]
            positions += 1
    comparison = compare_answers(model, tokenizer, items)
    assert comparison.positions == positions == len("yes") + len("a longer answer, too") + 3
    assert comparison.teacher_perplexity == pytest.approx(math.exp(sums[0] / positions), rel=1e-4)
    assert comparison.student_perplexity == pytest.approx(math.exp(sums[1] / positions), rel=1e-4)
    assert comparison.agreement_frac == pytest.approx(sums[2] / positions)
    assert comparison.kl_nats == pytest.approx(sums[3] / positions, rel=1e-4)


def test_figures_do_not_depend_on_the_batches(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_student(student_folder), load_tokenizer(student_folder)
    items = [{"prompt": "p" * length, "response": "r" * (9 - length)} for length in (1, 8, 3, 5)]
    together = compare_answers(model, tokenizer, items)
    monkeypatch.setattr("swiftkv.evaluate.tasks.compute_batch_tokens", lambda vocab_size: 1)
    apart = compare_answers(model, tokenizer, items)
    assert apart.positions == together.positions
    assert apart.kl_nats == pytest.approx(together.kl_nats, rel=1e-4)
    assert apart.student_perplexity == pytest.approx(together.student_perplexity, rel=1e-4)


def test_what_cannot_be_scored_is_refused(student_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_student(student_folder), load_tokenizer(student_folder)
    items = [{"prompt": "a", "response": "b"}]
    stripped = load_student(write_student(tmp_path, keep_teacher_projections=False))
    with pytest.raises(CheckpointError, match="has no teacher"):
        compare_answers(stripped, tokenizer, items)
    with pytest.raises(DataError, match="0 items"):
        generate_answers(None, tokenizer, [], 2)
    with pytest.raises(DataError, match="0 items"):
        compare_answers(model, tokenizer, [])
    endless: Any = load_tokenizer(student_folder)
    endless.eos_token = None
    with pytest.raises(DataError, match="no end token"):
        generate_answers(None, endless, ["a"], 2)
