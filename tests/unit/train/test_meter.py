"""Counted operations against their formulas; the peak is one that a matrix product reaches."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from ldm.train.meter import Meter, StepFlops, peak


def test_operations_of_a_step_are_three_forwards_of_what_is_trained_and_one_of_the_rest() -> None:
    frozen = nn.Linear(8, 16, bias=False)
    trained = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 1))
    counted = StepFlops(trained)
    with counted.counting():
        x = frozen(torch.randn(5, 8)).view(5, 4, 2, 2)
        trained(x).sum().backward()
    convolutions = 2 * 5 * 2 * 2 * (8 * 4 * 9 + 4 * 8)
    assert counted.total >= 3 * convolutions + 2 * 5 * 8 * 16
    again = StepFlops(trained)
    with again.counting():
        trained(frozen(torch.randn(5, 8)).view(5, 4, 2, 2))
    assert again.total == 3 * convolutions + 2 * 5 * 8 * 16
    assert not trained._forward_hooks
    assert not trained._forward_pre_hooks


def test_attention_is_counted() -> None:
    class Attention(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q)

    from torch.nn.attention import SDPBackend, sdpa_kernel

    attention = Attention()
    counted = StepFlops(attention)
    with counted.counting(), sdpa_kernel(SDPBackend.MATH):
        attention(torch.randn(2, 3, 7, 5, requires_grad=True))
    assert counted.total == 3 * 2 * (2 * 2 * 3 * 7 * 7 * 5)


def test_the_peak_is_finite_and_above_nothing() -> None:
    assert 1e6 < peak(torch.device("cpu"), torch.float32) < 1e15


def test_waiting_for_data_is_told_apart_from_the_forward() -> None:
    meter = Meter(torch.device("cpu"))

    def slow():
        while True:
            time.sleep(0.05)
            yield {}

    batches = slow()
    for _ in range(2):
        meter.next(batches)
        with meter.forward():
            time.sleep(0.02)
        meter.step()
    ((own, data, memory),) = meter.read()
    assert data >= 0.05
    assert own >= data + 0.02 - 1e-4
    assert memory > 0
    assert meter.read()[0][:2] == [0.0, 0.0]
    assert own == pytest.approx(data + 0.02, abs=0.5)
