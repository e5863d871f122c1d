"""The quality table's scores through real engines, against greedy answers of the independent reference."""

import importlib
import json

import pytest
from fakes import write_student, write_teacher
from reference import generate_greedy, load_weights
from unit.quality.conftest import SCRIPTS

from swiftkv.engine.settings import EngineSettings
from swiftkv.model.checkpoint import load_tokenizer
from swiftkv.model.convert import convert_teacher

pytestmark = [pytest.mark.engine, pytest.mark.soak]  # three engines for an example, whose parts CI tests

NEW_TOKENS = 4
"""No answer has so many bytes that two models give the same by chance."""


@pytest.fixture
def scores(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("scores")
    settings = EngineSettings(dtype="float32", enforce_eager=True, kv_cache_gib=0.05, max_model_len=256)
    monkeypatch.setattr(module, "ENGINE", settings)
    monkeypatch.setattr(module, "NEW_TOKENS", dict.fromkeys(module.NEW_TOKENS, NEW_TOKENS))
    return module


def test_each_model_is_scored_by_its_own_answers(scores, tmp_path):
    teacher, student = write_teacher(tmp_path / "teacher"), write_student(tmp_path / "student")
    untrained = convert_teacher(teacher, num_key_value_layers=3)
    untrained.save_pretrained(tmp_path / "untrained")
    tokenizer = load_tokenizer(student)
    prompts = [f"question {number}" for number in range(6)]
    # Right are: the teacher's answer to two prompts, the student's to three, the untrained student's to one.
    right = [("teacher", "teacher")] * 2 + [("student", "student")] * 3 + [("untrained", "student")]
    items = []
    for prompt, (folder, mode) in zip(prompts, right, strict=True):
        ids = generate_greedy(*load_weights(tmp_path / folder), list(prompt.encode()), NEW_TOKENS, mode=mode)
        items.append({"prompt": prompt, "response": tokenizer.decode(ids)})
    corpora = {name: items if name in scores.NEW_TOKENS else items[:1] for name in scores.CORPORA}
    kept = tmp_path / "teacher.json"
    of_teacher = scores.score_teacher(teacher, corpora, kept)
    figures = scores.score_student(student, corpora, of_teacher)
    for name in scores.NEW_TOKENS:
        found = {kind: figures[kind][name]["exact_match_frac"] for kind in ("teacher", "after", "before")}
        assert found == pytest.approx({"teacher": 2 / 6, "after": 3 / 6, "before": 1 / 6})
        assert figures["after"][name]["difference"]["difference_frac"] == pytest.approx(1 / 6)
    assert figures["before"]["answers"]["kl_nats"] != figures["after"]["answers"]["kl_nats"]
    kept.write_text(kept.read_text().replace("true", "false"))
    again = scores.score_teacher(tmp_path / "gone", corpora, kept)
    assert not any(again["spider"].matches), "kept scores are read, and nothing is served for them"
    assert json.loads(kept.read_text()).keys() == scores.NEW_TOKENS.keys()
