"""Schedules: published values, the inverse of lam, both ends, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from ldm.diffusion import Discrete, Flow

KINDS = ["linear", "quadratic", "scaled_linear", "cosine", "sigmoid"]


def test_published_values():
    bar = Discrete().alpha_bar()
    for t, want in {
        1: 0.9982960278384514,
        100: 0.8942234775865594,
        500: 0.2763326838229746,
        999: 0.004660098513077238,
    }.items():
        assert float(bar[t]) == pytest.approx(want, rel=1e-12)
    ratio = ((1 - bar) / bar).sqrt()
    assert float(ratio[0]) == pytest.approx(0.0291671582, rel=1e-8)
    assert float(ratio[-1]) == pytest.approx(14.6146412293, rel=1e-10)
    linear = Discrete(betas="linear", beta_start=1e-4, beta_end=0.02)
    assert float(linear.alpha_bar()[-1]) == pytest.approx(4.0358297654e-5, rel=1e-9)
    assert float(linear.beta()[-1]) == pytest.approx(0.02, rel=1e-9)


def test_zero_terminal_snr():
    schedule = Discrete(zero_terminal_snr=True)
    bar = schedule.alpha_bar()
    assert float(bar[-1]) == 0
    assert float(bar[0]) == pytest.approx(float(Discrete().alpha_bar()[0]), rel=1e-12)
    assert float(bar[500]) == pytest.approx(0.24101878275731575, rel=1e-12)
    assert float(bar[998]) == pytest.approx(1.9679e-7, rel=1e-4)
    assert schedule.at(999) == (0.0, 1.0)


@pytest.mark.parametrize("steps", [1, 7, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_any_length(kind, steps):
    schedule = Discrete(betas=kind, steps=steps)
    bar = schedule.alpha_bar()
    assert bar.shape == (steps,)
    assert bool(((bar > 0) & (bar < 1)).all())
    assert bool((bar.diff() < 0).all())
    assert torch.allclose(torch.cumprod(1 - schedule.beta(), 0), bar, rtol=1e-10)
    alpha, sigma = schedule.alpha_sigma(torch.arange(steps), torch.float64)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(steps, dtype=torch.float64), atol=1e-14)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_time_inverts_lam(kind, zero):
    schedule = Discrete(betas=kind, beta_start=1e-4, beta_end=0.02, zero_terminal_snr=zero)
    for t in (0.0, 0.25, 17.5, 500.0, 813.3, 998.0):
        alpha, sigma = schedule.at(t)
        assert schedule.time(math.log(alpha / sigma)) == pytest.approx(t, abs=1e-4)


def test_flow():
    flow = Flow(shift=3.0)
    assert flow.at(250.0) == (0.75, 0.25)
    assert flow.time(math.log(3)) == pytest.approx(250.0)
    assert flow.warp(500.0) == pytest.approx(750.0)  # 3 / 2 / (1 + 1)
    t = Flow(shift=3.0).sample(torch.tensor([0.0, 0.5, 0.999999]))
    assert torch.allclose(t, torch.tensor([0.0, 750.0, 1000.0]), atol=1e-2)
    alpha, sigma = flow.alpha_sigma(torch.tensor([0.0, 1000.0]))
    assert alpha.tolist() == [1.0, 0.0]
    assert sigma.tolist() == [0.0, 1.0]


def test_training_times_cover_all_evenly():
    t = Discrete(steps=10).sample((torch.arange(1000) + 0.5) / 1000)
    assert torch.bincount(t, minlength=10).tolist() == [100] * 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Discrete(betas="odd"), "betas must be one of"),
        (lambda: Discrete(steps=0), "steps must be at least 1"),
        (lambda: Discrete(steps=1, zero_terminal_snr=True), "steps must be at least 2"),
        (lambda: Discrete(beta_start=0.1, beta_end=0.01), "beta_start and beta_end"),
        (lambda: Flow(steps=0), "steps must be at least 1"),
        (lambda: Flow(shift=0.0), "shift must be above 0"),
        (lambda: Discrete().alpha_sigma(torch.tensor([1000])), r"t must lie in \[0, 999\]"),
        (lambda: Flow().alpha_sigma(torch.tensor([-1.0])), r"t must lie in \[0, 1000\]"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
