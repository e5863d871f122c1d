"""The peak of tensor memory, counted by hand."""

import torch

from swiftkv.bench.memory import PeakMemory

KILOBYTE = torch.zeros(256)


def test_the_peak_is_what_lives_at_once() -> None:
    with PeakMemory() as memory:
        first = KILOBYTE + 1
        second = first * 2
        del first
        third = second * 2  # in the place of the first
        assert third is not None
    assert memory.peak_bytes == 2 * 1024


def test_views_and_changes_in_place_hold_nothing_of_their_own() -> None:
    with PeakMemory() as memory:
        tensor = KILOBYTE + 1
        tensor.view(2, 128).add_(1)
        KILOBYTE[:10].mul_(1)  # was there before
    assert memory.peak_bytes == 1024


def test_what_autograd_keeps_for_the_backward_pass_is_held() -> None:
    weight = KILOBYTE.clone().requires_grad_()
    with PeakMemory() as memory:
        loss = weight.exp().exp().exp().sum()  # each result is kept for its gradient
        held = memory.peak_bytes
        loss.backward()
    assert held == 3 * 1024 + 4
    assert memory.peak_bytes > held
