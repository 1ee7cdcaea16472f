"""Huber, smooth L1 and L1 losses against sd-scripts' formulas in float64, their thresholds, and their limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.diffusion import Discrete, Epsilon, Flow, Process, Velocity
from ldm.diffusion.shape import Absolute, Huber, SmoothL1, Squared

T = torch.tensor([0, 1, 250, 500, 999])


def bar() -> Tensor:
    """The product of Stable Diffusion's alphas, float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def theirs(schedule: str, t: Tensor, c: float, scale: float) -> Tensor:
    """The threshold as sd-scripts computes it, of Stable Diffusion's schedule."""
    if schedule == "exponential":
        return torch.exp(math.log(c) / 1000 * t.double()) * scale
    if schedule == "snr":
        sigmas = ((1 - bar()[t]) / bar()[t]) ** 0.5
        return (1 - c) / (1 + sigmas) ** 2 + c
    return torch.full(t.shape, c * scale, dtype=torch.float64)


@pytest.mark.parametrize(("schedule", "scale"), [("constant", 2.0), ("exponential", 0.5), ("snr", 1.0)])
@pytest.mark.parametrize("c", [0.1, 0.7])
def test_thresholds(schedule: Any, scale: float, c: float) -> None:
    found = Huber(schedule=schedule, c=c, scale=scale).threshold(T, Discrete())
    torch.testing.assert_close(found.double(), theirs(schedule, T, c, scale), rtol=1e-5, atol=0)


def test_thresholds_of_a_flow() -> None:
    """By its own time: c^(t / T), and sigma / alpha = s / (1 - s), at the noise c."""
    t = torch.tensor([0.0, 250.0, 500.0, 1000.0])
    s = t.double() / 1000
    exponential = Huber(schedule="exponential", c=0.2, scale=3.0).threshold(t, Flow())
    torch.testing.assert_close(exponential.double(), 3 * 0.2**s, rtol=1e-6, atol=0)
    snr = Huber(schedule="snr", c=0.2).threshold(t, Flow(shift=3.0))
    torch.testing.assert_close(snr.double(), 0.8 * (1 - s) ** 2 + 0.2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [Huber, SmoothL1])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_loss_of_a_process_is_theirs(kind: Any, schedule: Any) -> None:
    """conditional_loss: 2 d (sqrt(x^2 + d^2) - d), smooth L1 without the first d; the mean of each sample."""
    generator = torch.Generator().manual_seed(1)
    out, x0, noise = (torch.randn(5, 4, 3, 3, generator=generator) * 2 for _ in range(3))
    found = Process(prediction=Epsilon()).loss(out, x0, noise, T, shape=kind(schedule=schedule))
    d = theirs(schedule, T, 0.1, 1.0).view(-1, 1, 1, 1)
    root = ((out - noise).double() ** 2 + d**2).sqrt() - d
    expected = (2 * d * root if kind is Huber else 2 * root).mean((1, 2, 3))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_l1_and_mse_are_torchs() -> None:
    generator = torch.Generator().manual_seed(2)
    out, x0, noise = (torch.randn(5, 4, 3, 3, generator=generator) for _ in range(3))
    process = Process(schedule=Flow(), prediction=Velocity())
    t = torch.tensor([1.0, 200.0, 400.0, 600.0, 999.0])
    target = noise - x0
    for shape, theirs_of in ((Absolute(), torch.nn.functional.l1_loss), (Squared(), torch.nn.functional.mse_loss)):
        expected = theirs_of(out, target, reduction="none").mean((1, 2, 3))
        torch.testing.assert_close(process.loss(out, x0, noise, t, shape=shape), expected, rtol=1e-5, atol=1e-6)


def test_limits() -> None:
    """Of small errors huber is the square, of large ones a line of slope 2 d; smooth L1 twice the size."""
    small, large = torch.tensor([[1e-3]]), torch.tensor([[1e3]])
    t, schedule = torch.tensor([500]), Discrete()
    huber, smooth = (shape(schedule="constant", c=0.5) for shape in (Huber, SmoothL1))
    assert float(huber.cost(small.double(), t, schedule)) == pytest.approx(1e-6, rel=1e-5)
    assert float(huber.cost(large.double(), t, schedule)) == pytest.approx(1e3, rel=1e-3)
    assert float(smooth.cost(large.double(), t, schedule)) == pytest.approx(2e3, rel=1e-3)


@pytest.mark.parametrize("bad", [{"c": 0.0}, {"c": 2.0}, {"scale": 0.0}, {"scale": 2.0}])
def test_bad_values_are_refused_by_name(bad: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Huber(**bad)


@pytest.mark.parametrize("process", [Process(), Process(schedule=Flow(), prediction=Velocity())])
def test_times_are_in_their_range_and_even(process: Process) -> None:
    """torch.randint(200, 800) of discrete times, and real times spread as evenly."""
    u = (torch.arange(6000, dtype=torch.float64) + 0.5) / 6000
    t = process.times(u.float(), None, (200, 800))
    assert float(t.min()) >= 200
    assert float(t.max()) < 800
    counts = torch.histc(t.double(), bins=6, min=200, max=800)
    assert counts.tolist() == pytest.approx([1000] * 6, abs=2)
    if process.schedule.discrete:
        assert t.dtype == torch.int64
        assert sorted(set(t.tolist())) == list(range(200, 800))


def test_a_flows_shift_is_inside_the_range() -> None:
    process = Process(schedule=Flow(shift=3.0), prediction=Velocity())
    u = torch.tensor([0.25, 0.5])
    whole = process.times(u)
    torch.testing.assert_close(process.times(u, None, (500, 1000)), 500 + whole / 2)
