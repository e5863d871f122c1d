"""Tasks of lm-eval through real endpoints, against answers and likelihoods computed here from the same weights."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from fakes import write_student, write_teacher
from reference import generate_greedy, load_weights
from typer.testing import CliRunner

from swiftkv.cli.main import app
from swiftkv.model.checkpoint import load_student, load_tokenizer
from swiftkv.registry.registry import Registry

pytestmark = [pytest.mark.engine, pytest.mark.cluster]

PROMPTS = [
    f"{word} {thing} line {number}" for number in range(80) for word in ("the", "quick") for thing in ("fox", "def")
]
NEW_TOKENS = 3
NUM_ITEMS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Path:
    return write_teacher(folder / "teacher")


@pytest.fixture(scope="module")
def student(folder: Path, teacher: Path) -> Path:
    return write_student(folder / "student")


def write_tasks(folder: Path, prompts: list[str], answers: list[str], choices: list[tuple[str, str]]) -> Path:
    """Two tasks over local files: answers to be generated, and a choice of two."""
    folder.mkdir()
    items = [
        {"prompt": prompt, "answer": answer, "choices": list(pair), "label": 0}
        for prompt, answer, pair in zip(prompts, answers, choices, strict=True)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "target_delimiter": "",
        "metadata": {"version": 1.0},
    }
    generated = {
        "task": "own_generated",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\u0000"], "max_gen_toks": NEW_TOKENS},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    chosen = {
        "task": "own_chosen",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (generated, chosen):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(shared | task))
    return folder


def compute_accuracy(model, tokenizer, prompts: list[str], choices: list[tuple[str, str]], teacher: bool) -> float:
    """Part of the items whose first choice is likelier, by plain forward passes."""
    right = 0
    for prompt, pair in zip(prompts, choices, strict=True):
        scores = []
        for choice in pair:
            context = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            whole = tokenizer(prompt + choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([whole]), teacher=teacher).logits[0].float().log_softmax(-1)
            scores.append(sum(float(logits[place - 1, whole[place]]) for place in range(len(context), len(whole))))
        right += scores[0] > scores[1]
    return right / len(prompts)


def test_scores_are_those_of_the_weights_and_decide_a_promotion(folder, student, teacher, monkeypatch):
    monkeypatch.setenv("SWIFTKV_HOME", str(folder / "home"))
    model, tokenizer = load_student(student).eval(), load_tokenizer(student)
    config, weights = load_weights(student)
    tokens = [generate_greedy(config, weights, list(prompt.encode()), NEW_TOKENS) for prompt in PROMPTS]
    own = {prompt: tokenizer.decode(ids) for prompt, ids in zip(PROMPTS, tokens, strict=True)}
    # Templates change white space at the ends, and a random model's bytes are seldom text.
    prompts = [prompt for prompt, answer in own.items() if re.fullmatch(r"[!-Z^-~]+", answer)][:NUM_ITEMS]
    assert len(prompts) == NUM_ITEMS
    # The student's own answer in two of three items, so that a wrong engine or a wrong score shows.
    answers = [own[prompt] if number % 3 else "something else" for number, prompt in enumerate(prompts)]
    choices = [(f" {number}", " z") for number in range(NUM_ITEMS)]
    tasks = write_tasks(folder / "own", prompts, answers, choices)
    registry = Registry(folder / "home" / "registry")
    registry.publish(student, "tiny")
    gate = folder / "gate.yaml"
    limit = {"figure": "tasks.own_generated.student.exact_match", "at_least": 0.6}
    gate.write_text(yaml.safe_dump({"name": "own", "limits": [limit]}))
    words = ["evaluate", "tiny@1", "--tasks", "own_generated,own_chosen", "--task-folder", str(tasks), "--eager"]
    result = CliRunner().invoke(
        app, [*words, "--teacher", str(teacher), "--gate", str(gate)], catch_exceptions=False, env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    figures = registry.list_evaluations("tiny@1")[0].figures
    scores = figures["tasks"]
    assert scores["own_generated"]["student"]["exact_match"] == pytest.approx(8 / 12)
    of_student = compute_accuracy(model, tokenizer, prompts, choices, teacher=False)
    assert scores["own_chosen"]["student"]["acc"] == pytest.approx(of_student)
    assert scores["own_chosen"]["student_without_skipping"]["acc"] == pytest.approx(of_student)
    assert scores["own_chosen"]["teacher"]["acc"] == pytest.approx(
        compute_accuracy(model, tokenizer, prompts, choices, teacher=True)
    )
    assert figures["quantisation"] == {"student": "none", "teacher": "none"}
    assert figures["harness"]["settings"]["lm_eval"] and "student" in figures["harness"]["outputs"]
    registry.promote("tiny@1", "production")
