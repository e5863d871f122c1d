"""One distillation step against two whole passes, and the losses against what they should be."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fakes import write_teacher

from swiftkv.distill.losses import compute_hidden_loss, compute_learning_rate_factor, compute_logits_kl
from swiftkv.distill.step import DistillStep
from swiftkv.errors import ShapeError
from swiftkv.model.convert import convert_teacher, freeze_teacher
from swiftkv.model.modeling import SwiftKVForCausalLM

IDS = torch.arange(60).reshape(2, 30) * 7 % 256
MASK = torch.rand(2, 30, generator=torch.Generator().manual_seed(0)) < 0.6


@pytest.fixture
def model(tmp_path: Path) -> SwiftKVForCausalLM:
    model = convert_teacher(write_teacher(tmp_path), 2, 2)
    freeze_teacher(model)
    with torch.no_grad():  # away from the initialisation, where some gradients would be special
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def test_shared_first_half_gives_the_loss_and_gradients_of_two_whole_passes(model: SwiftKVForCausalLM) -> None:
    losses = DistillStep(model, temperature=2.0, hidden_loss_weight=0.5)(IDS, MASK, num_positions=int(MASK.sum()))
    losses["loss"].backward()
    shared = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    loss = _compute_loss_of_two_whole_passes(model, temperature=2.0, hidden_loss_weight=0.5)
    loss.backward()
    whole = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(losses["loss"], loss, atol=1e-5, rtol=1e-5)
    assert shared.keys() == whole.keys() == {name for name, _ in model.named_parameters() if "swiftkv" in name}
    for name, gradient in whole.items():
        torch.testing.assert_close(shared[name], gradient, atol=1e-6, rtol=1e-4)


def test_kl_is_zero_when_student_equals_teacher() -> None:
    logits = torch.randn(2, 5, 11)
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert compute_logits_kl(logits, logits + 3.0, mask, 2.0, 10).abs() < 1e-6
    assert compute_logits_kl(logits * 2, logits, mask, 2.0, 10) > 0.01


def test_kl_is_the_sum_over_probabilities_times_the_squared_temperature() -> None:
    student, teacher = torch.randn(1, 3, 7), torch.randn(1, 3, 7)
    mask = torch.tensor([[True, False, True]])
    p, q = (torch.softmax(logits[0] / 2, -1) for logits in (teacher, student))
    expected = 4 * sum((p[t] * (p[t] / q[t]).log()).sum() for t in (0, 2)) / 2
    torch.testing.assert_close(compute_logits_kl(student, teacher, mask, 2.0, 2), expected)


def test_masked_positions_change_nothing_and_an_empty_mask_gives_zero() -> None:
    student, teacher = torch.randn(1, 4, 7), torch.randn(1, 4, 7)
    mask = torch.tensor([[True, True, False, True]])
    changed = student.clone()
    changed[0, 2] += 5
    for compute, extra in ((compute_logits_kl, (2.0,)), (compute_hidden_loss, ())):
        assert compute(student, teacher, mask, *extra, 3) == compute(changed, teacher, mask, *extra, 3)
        assert compute(student, teacher, torch.zeros_like(mask), *extra, 0) == 0


def test_losses_refuse_other_shapes() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ShapeError, match=r"\(1, 2, 5\), the teacher's \(1, 2, 6\)"):
        compute_logits_kl(torch.zeros(1, 2, 5), torch.zeros(1, 2, 6), mask, 2.0, 2)


def test_learning_rate_warms_up_and_decays_to_almost_zero() -> None:
    factors = [compute_learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == 1.0 and factors.index(1.0) == 9
    assert factors[-1] < 0.02 and all(a > b for a, b in itertools.pairwise(factors[10:]))


def _compute_loss_of_two_whole_passes(
    model: SwiftKVForCausalLM, temperature: float, hidden_loss_weight: float
) -> torch.Tensor:
    decoder, states = model.model, []
    for run_half, grad in ((decoder.run_teacher_half, False), (decoder.run_student_half, True)):
        with torch.set_grad_enabled(grad):
            states.append(run_half(decoder.compute_boundary(IDS)))
    teacher, student = (model.lm_head(state.last_BTD)[MASK] / temperature for state in states)
    cross = -(F.softmax(teacher, -1) * F.log_softmax(student, -1)).sum()
    entropy = -(F.softmax(teacher, -1) * F.log_softmax(teacher, -1)).sum()
    logits_kl = (cross - entropy) * temperature**2 / MASK.sum()
    hidden_loss = F.mse_loss(states[1].penultimate_BTD[MASK], states[0].penultimate_BTD[MASK])
    return logits_kl + hidden_loss_weight * hidden_loss
