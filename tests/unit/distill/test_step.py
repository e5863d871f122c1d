"""One distillation step against two whole passes and the reference, and the losses against what they should be."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fakes import write_teacher
from reference import FAMILIES, compute_hidden_states, compute_logits, load_weights
from torch import Tensor, nn

from swiftkv.bench.memory import PeakMemory
from swiftkv.distill.losses import (
    compute_learning_rate_factor,
    compute_logits_kl,
    sum_by_tiles,
    sum_hidden_loss,
    sum_logits_kl,
)
from swiftkv.distill.step import Batch, DistillStep
from swiftkv.errors import ShapeError
from swiftkv.model.checkpoint import save_student
from swiftkv.model.convert import convert_teacher, freeze_teacher
from swiftkv.model.modeling import SwiftKVForCausalLM

IDS = torch.arange(60).reshape(2, 30) * 7 % 256
EVERYWHERE = torch.ones(2, 30, dtype=torch.bool)
SCATTERED = torch.rand(2, 30, generator=torch.Generator().manual_seed(0)) < 0.6
ANSWERS = torch.arange(30).expand(2, -1) >= torch.tensor([[25], [20]])
ONE_ROW_ONLY = torch.stack([EVERYWHERE[0], ~EVERYWHERE[1]])
MASKS = {"everywhere": EVERYWHERE, "scattered": SCATTERED, "answers": ANSWERS, "one row only": ONE_ROW_ONLY}


@pytest.fixture
def model(tmp_path: Path) -> SwiftKVForCausalLM:
    return build_student(tmp_path)


def build_student(folder: Path, family: str = "llama", group_size: int = 2, **changes: object) -> SwiftKVForCausalLM:
    """A student away from its initialisation, where some gradients would be special."""
    model = convert_teacher(write_teacher(folder / "teacher", family=family, **changes), 2, group_size)
    freeze_teacher(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_step_gives_the_loss_and_gradients_of_two_whole_passes(model: SwiftKVForCausalLM, mask: Tensor) -> None:
    batch = Batch.from_mask(IDS, mask)
    losses = DistillStep(model, temperature=2.0, hidden_loss_weight=0.5)(batch, num_positions=int(mask.sum()))
    losses["loss"].backward()
    shared = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    loss = _compute_loss_of_two_whole_passes(model, mask, temperature=2.0, hidden_loss_weight=0.5)
    loss.backward()
    whole = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(losses["loss"], loss, atol=1e-5, rtol=1e-5)
    assert shared.keys() == whole.keys() == {name for name, _ in model.named_parameters() if "swiftkv" in name}
    for name, gradient in whole.items():
        torch.testing.assert_close(shared[name], gradient, atol=1e-6, rtol=1e-4)


def test_only_positions_with_a_loss_are_computed_where_no_other_depends_on_them(model: SwiftKVForCausalLM) -> None:
    rows: dict[int, list[int]] = {-2: [], -1: []}
    for index, counts in rows.items():
        hook = lambda _module, _args, output, counts=counts: counts.append(output.shape[1])  # noqa: E731
        model.model.layers[index].mlp.register_forward_hook(hook)
    DistillStep(model, 2.0, 1.0)(Batch.from_mask(IDS, ANSWERS), 15)
    # Teacher, then student, for which 10 is what the row with most answers has. The last layer has nobody behind it.
    assert rows == {-2: [30, 10], -1: [10, 10]}


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_of_packed_rows_are_those_of_each_document_in_the_reference(
    tmp_path: Path, family: str, window: int | None
) -> None:
    if window is not None and family != "mistral":
        pytest.skip("only Mistral has a window here")
    model = build_student(tmp_path, family, **({} if window is None else {"sliding_window": window}))
    lengths = ((11, 19), (4, 20, 6))
    position_ids = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    batch = Batch.from_mask(IDS, SCATTERED, position_ids)
    losses = DistillStep(model, 2.0, 1.0)(batch, num_positions=1)

    save_student(model, tmp_path / "student", tmp_path / "teacher")
    student, teacher = load_weights(tmp_path / "student"), load_weights(tmp_path / "teacher")
    logits_kl = hidden_loss = torch.zeros(())
    for ids, mask, row in zip(IDS, SCATTERED, lengths, strict=True):
        for tokens, kept in zip(ids.split(row), mask.split(row), strict=True):
            document = tokens.tolist()
            logits = [
                compute_logits(*side, document, mode)[kept] / 2.0
                for side, mode in ((student, "student"), (teacher, "teacher"))
            ]
            logits_kl = logits_kl + _sum_kl(*logits) * 4.0
            hidden = [
                compute_hidden_states(*side, document, mode)[-2][kept]
                for side, mode in ((student, "student"), (teacher, "teacher"))
            ]
            hidden_loss = hidden_loss + (hidden[0] - hidden[1]).square().mean(-1).sum()
    torch.testing.assert_close(losses["logits_kl"], logits_kl, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(losses["hidden_loss"], hidden_loss, atol=1e-5, rtol=1e-4)


def test_a_batch_without_any_position_has_no_loss_and_no_gradient(model: SwiftKVForCausalLM) -> None:
    loss = DistillStep(model, 2.0, 1.0)(Batch.from_mask(IDS, ~EVERYWHERE), num_positions=0)["loss"]
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]  # several workers wait for each gradient
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in trained)


@pytest.mark.parametrize("positions_per_tile", [1, 3, 37, 50])
def test_tiled_losses_have_the_value_and_gradient_of_untiled_ones(positions_per_tile: int) -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 61, bias=False).requires_grad_(False)

    def compute(student: Tensor, teacher: Tensor) -> Tensor:
        return compute_logits_kl(head(student), head(teacher), 1.5)

    student, teacher = (4 * torch.randn(37, 16) for _ in range(2))
    values, gradients = [], []
    for total in (lambda s: sum_by_tiles(compute, s, teacher, positions_per_tile), lambda s: compute(s, teacher)):
        leaf = student.clone().requires_grad_()
        values.append(total(leaf))
        (3 * values[-1]).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*values, atol=0, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_tiled_losses_need_a_quarter_of_the_memory() -> None:
    head = nn.Linear(32, 32_768, bias=False).requires_grad_(False)  # 256 positions per tile

    def measure_peak(compute: Callable[[Tensor, Tensor], Tensor]) -> int:
        student, teacher = torch.randn(2048, 32, requires_grad=True), torch.randn(2048, 32)
        with PeakMemory() as memory:
            compute(student, teacher).backward()
        return memory.peak_bytes

    tiled = measure_peak(lambda s, t: sum_logits_kl(s, t, head.weight, 2.0))
    whole = measure_peak(lambda s, t: compute_logits_kl(head(s), head(t), 2.0))
    assert tiled < whole / 4
    assert whole > 3 * 2048 * 32_768 * 4  # the logits did exist, so the tracker saw them


def test_kl_is_zero_when_student_equals_teacher() -> None:
    logits = torch.randn(10, 11)
    assert compute_logits_kl(logits, logits + 3.0, 2.0).abs() < 1e-5
    assert compute_logits_kl(logits * 2, logits, 2.0) > 0.1


def test_kl_is_the_sum_over_probabilities_times_the_squared_temperature() -> None:
    student, teacher = torch.randn(3, 7), torch.randn(3, 7)
    torch.testing.assert_close(compute_logits_kl(student, teacher, 2.0), 4 * _sum_kl(student / 2, teacher / 2))


def test_hidden_loss_is_the_mean_squared_difference() -> None:
    student, teacher = torch.randn(5, 8), torch.randn(5, 8)
    torch.testing.assert_close(sum_hidden_loss(student, teacher), 5 * F.mse_loss(student, teacher))


def test_losses_refuse_other_shapes() -> None:
    with pytest.raises(ShapeError, match=r"\(2, 5\), the teacher's \(2, 6\)"):
        sum_hidden_loss(torch.zeros(2, 5), torch.zeros(2, 6))


def test_learning_rate_warms_up_and_decays_to_almost_zero() -> None:
    factors = [compute_learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == 1.0 and factors.index(1.0) == 9
    assert factors[-1] < 0.02 and all(a > b for a, b in itertools.pairwise(factors[10:]))


def _compute_loss_of_two_whole_passes(
    model: SwiftKVForCausalLM, mask: Tensor, temperature: float, hidden_loss_weight: float
) -> Tensor:
    decoder, states = model.model, []
    for run_half, grad in ((decoder.run_student_half, True), (decoder.run_teacher_half, False)):
        with torch.set_grad_enabled(grad):
            states.append(run_half(decoder.compute_boundary(IDS)))
    logits_kl = _sum_kl(*(model.lm_head(state.last_BTD)[mask] / temperature for state in states))
    hidden_loss = F.mse_loss(*(state.penultimate_BTD[mask] for state in states))
    return logits_kl * temperature**2 / mask.sum() + hidden_loss_weight * hidden_loss


def _sum_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross entropy less entropy, summed over positions."""
    p = F.softmax(teacher, -1)
    return (p * (F.log_softmax(teacher, -1) - F.log_softmax(student, -1))).sum()
