"""When a loss is no longer trusted."""

import math

import pytest

from swiftkv.distill.divergence import DivergenceGuard


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_number_is_found_at_once(value: float) -> None:
    assert DivergenceGuard(None).find_problem(value, 1.0) == f"the loss is {value}"
    assert DivergenceGuard(None).find_problem(1.0, value) == f"the gradient's norm is {value}"


def test_a_spike_is_found_after_twenty_steps_and_a_slow_rise_is_not() -> None:
    guard = DivergenceGuard(4.0)
    assert guard.find_problem(1.0, 1.0) is None and guard.find_problem(9.0, 1.0) is None  # too early to know
    assert all(guard.find_problem(1.0 * 1.05**step, 1.0) is None for step in range(60))
    problem = guard.find_problem(1000.0, 1.0)
    assert problem is not None and "times the mean of the last 20 steps" in problem
    assert DivergenceGuard(None, [1.0] * 20).find_problem(1000.0, 1.0) is None


def test_a_student_that_equals_its_teacher_does_not_spike() -> None:
    assert DivergenceGuard(4.0, [0.0] * 20).find_problem(1e-9, 1.0) is None


def test_a_guard_remembers_the_steps_before_it() -> None:
    assert DivergenceGuard(4.0, [1.0] * 20).find_problem(5.0, 1.0) is not None
    assert DivergenceGuard(4.0, [1.0] * 19).find_problem(5.0, 1.0) is None
