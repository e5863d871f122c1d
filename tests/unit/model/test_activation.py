"""SiLU in place: no fewer digits, no second buffer without gradient, and none overwritten that a gradient needs."""

import torch
import torch.nn.functional as F

from swiftkv.model.activation import InPlaceSiLU


def test_without_gradient_the_result_lies_where_the_input_was() -> None:
    gate = torch.randn(3, 5)
    expected = F.silu(gate)
    result = InPlaceSiLU()(gate)
    assert result.data_ptr() == gate.data_ptr()
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_with_gradient_the_input_stays() -> None:
    gate = torch.randn(3, 5, requires_grad=True)
    before = gate.detach().clone()
    (InPlaceSiLU()(gate * 1).square().sum()).backward()
    torch.testing.assert_close(gate.detach(), before, rtol=0, atol=0)
    sigmoid = before.sigmoid()
    expected = 2 * before * sigmoid * (sigmoid + before * sigmoid * (1 - sigmoid))  # of (x sigmoid(x)) squared
    torch.testing.assert_close(gate.grad, expected)


def test_without_grad_mode_a_parameters_product_is_overwritten_but_not_the_parameter() -> None:
    linear = torch.nn.Linear(4, 6)
    states = torch.randn(2, 4)
    kept = states.clone()
    with torch.no_grad():
        torch.testing.assert_close(InPlaceSiLU()(linear(states)), F.silu(linear(states)))
    torch.testing.assert_close(states, kept, rtol=0, atol=0)
