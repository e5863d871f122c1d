"""Gates: every kind of limit, and figures that are not there."""

import math
from pathlib import Path

import pytest

from swiftkv.config import load_yaml, parse_settings
from swiftkv.errors import ConfigError
from swiftkv.evaluate.gates import Gate

FIGURES = {
    "teacher_perplexity": 10.0,
    "student_after": {"kl_nats": 0.04, "student_perplexity": 10.4, "agreement_frac": 0.93, "broken": math.nan},
    "tasks": {"gsm8k": {"student": {"exact_match": 0.712}, "teacher": {"exact_match": 0.724}}},
}
GATES = Path(__file__).parents[3] / "jobs" / "gates"


@pytest.mark.parametrize(
    ("limit", "found", "passed"),
    [
        ({"figure": "student_after.kl_nats", "at_most": 0.05}, 0.04, True),
        ({"figure": "student_after.kl_nats", "at_most": 0.03}, 0.04, False),
        ({"figure": "student_after.kl_nats", "at_most": 0.04}, 0.04, True),
        ({"figure": "student_after.agreement_frac", "at_least": 0.95}, 0.93, False),
        ({"figure": "student_after.student_perplexity", "of": "teacher_perplexity", "ratio_at_most": 1.05}, 1.04, True),
        (
            {"figure": "student_after.student_perplexity", "of": "teacher_perplexity", "ratio_at_most": 1.03},
            1.04,
            False,
        ),
        (
            {
                "figure": "tasks.gsm8k.student.exact_match",
                "of": "tasks.gsm8k.teacher.exact_match",
                "lost_points_at_most": 1,
            },
            1.2,
            False,
        ),
        (
            {
                "figure": "tasks.gsm8k.student.exact_match",
                "of": "tasks.gsm8k.teacher.exact_match",
                "lost_points_at_most": 2,
            },
            1.2,
            True,
        ),
        ({"figure": "tasks.ifeval.student", "at_least": 0.1}, None, False),
        ({"figure": "tasks.gsm8k", "at_most": 1}, None, False),
        ({"figure": "student_after.kl_nats", "of": "nothing", "ratio_at_most": 2}, None, False),
    ],
)
def test_limits(limit, found, passed):
    result = parse_settings({"name": "g", "limits": [limit]}, Gate, "gate").judge(FIGURES)
    assert result.limits[0].found == (None if found is None else pytest.approx(found))
    assert (result.passed, result.limits[0].passed) == (passed, passed)


@pytest.mark.parametrize(("teacher", "passed"), [("none", False), ("fp8", True)])
def test_tasks_are_compared_at_equal_quantisation_only(teacher, passed):
    limit = {
        "figure": "tasks.gsm8k.student.exact_match",
        "of": "tasks.gsm8k.teacher.exact_match",
        "lost_points_at_most": 2,
    }
    gate = parse_settings({"name": "g", "limits": [limit]}, Gate, "gate")
    result = gate.judge(FIGURES | {"quantisation": {"student": "fp8", "teacher": teacher}})
    assert result.passed == passed
    assert result.limits[0].found == pytest.approx(1.2), "the figure is told all the same"
    assert ("student: fp8; teacher: none" in result.limits[0].limit) == (not passed)


def test_a_student_beside_itself_is_always_comparable():
    figures = {"student": {"acc": 0.5}, "teacher": {"acc": 0.5}, "student_without_skipping": {"acc": 0.5}}
    limit = {"figure": "tasks.x.student.acc", "of": "tasks.x.student_without_skipping.acc", "lost_points_at_most": 1}
    measured = {"tasks": {"x": figures}, "quantisation": {"student": "fp8 {}", "teacher": "none"}}
    assert parse_settings({"name": "g", "limits": [limit]}, Gate, "gate").judge(measured).passed


def test_perplexities_come_from_one_folder_whatever_its_quantisation():
    limit = {"figure": "student_after.student_perplexity", "of": "teacher_perplexity", "ratio_at_most": 1.05}
    figures = FIGURES | {"quantisation": {"student": "fp8", "teacher": "none"}}
    assert parse_settings({"name": "g", "limits": [limit]}, Gate, "gate").judge(figures).passed


def test_a_figure_that_is_no_number_never_passes():
    limits = [{"figure": "student_after.broken", "at_most": 1e9}, {"figure": "student_after.broken", "at_least": -1e9}]
    assert not any(limit.passed for limit in Gate(name="g", limits=limits).judge(FIGURES).limits)


def test_one_missed_limit_fails_the_gate():
    limits = [{"figure": "student_after.kl_nats", "at_most": limit} for limit in (0.05, 0.03)]
    assert [limit.passed for limit in Gate(name="g", limits=limits).judge(FIGURES).limits] == [True, False]
    assert not Gate(name="g", limits=limits).judge(FIGURES).passed


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"figure": "a"}, "given: none"),
        ({"figure": "a", "at_most": 1, "at_least": 0}, "given: at_most, at_least"),
        ({"figure": "a", "ratio_at_most": 1}, "ratio_at_most needs `of`"),
        ({"figure": "a", "of": "b", "at_most": 1}, "at_most does not take `of`"),
        ({"figure": "a", "most": 1}, "most: unknown key"),
    ],
)
def test_gates_that_say_too_little_or_too_much_are_refused(limit, message):
    with pytest.raises(ConfigError, match=message):
        parse_settings({"name": "g", "limits": [limit]}, Gate, "gate")


@pytest.mark.parametrize("path", sorted(GATES.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_gates_can_be_read_and_fail_what_was_not_measured(path):
    assert not load_yaml(path, Gate).judge({}).passed


def test_shipped_gate_passes_a_good_student():
    assert load_yaml(GATES / "held-out.yaml", Gate).judge(FIGURES).passed
