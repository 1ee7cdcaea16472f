"""Parameterisations: exact conversions, finite at both ends, gains equal to measured errors."""

from __future__ import annotations

import itertools

import pytest
import torch

from ldm.diffusion import PREDICTIONS, Discrete, Flow, convert

PAIRS = list(itertools.product(PREDICTIONS, PREDICTIONS))
T = torch.tensor([0, 1, 300, 998])


def data(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(4, 3, 5, 5, generator=g, dtype=dtype), torch.randn(4, 3, 5, 5, generator=g, dtype=dtype))


@pytest.mark.parametrize(("source", "into"), PAIRS)
@pytest.mark.parametrize("schedule", [Discrete(), Flow()])
def test_every_pair_converts(schedule, source, into):
    x0, noise = data()
    alpha, sigma = schedule.alpha_sigma(T.double() + 1, torch.float64)
    x = alpha.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * noise
    first, second = PREDICTIONS[source], PREDICTIONS[into]
    out = first.target(x0, noise, alpha, sigma)
    assert torch.allclose(first.x0(out, x, alpha, sigma), x0, atol=1e-10)
    assert torch.allclose(first.noise(out, x, alpha, sigma), noise, atol=1e-10)
    there = convert(out, x, alpha, sigma, first, second)
    assert torch.allclose(there, second.target(x0, noise, alpha, sigma), atol=1e-10)


@pytest.mark.parametrize(("source", "into"), PAIRS)
@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0)])
def test_finite_at_both_ends(ends, source, into):
    """Also under autograd; v and velocity stay exact, the others give 0 for what cannot be known."""
    alpha, sigma = (torch.full((4,), v, dtype=torch.float64) for v in ends)
    x0, noise = data()
    x = ends[0] * x0 + ends[1] * noise
    out = PREDICTIONS[source].target(x0, noise, alpha, sigma).requires_grad_()
    there = convert(out, x, alpha, sigma, PREDICTIONS[source], PREDICTIONS[into])
    there.sum().backward()
    assert bool(torch.isfinite(there).all())
    assert bool(torch.isfinite(out.grad).all())
    if source in ("v", "velocity"):
        assert torch.allclose(there, PREDICTIONS[into].target(x0, noise, alpha, sigma), atol=1e-12)


@pytest.mark.parametrize("name", list(PREDICTIONS))
def test_gains_are_the_errors(name):
    prediction = PREDICTIONS[name]
    x0, noise = data()
    alpha, sigma = Discrete().alpha_sigma(T, torch.float64)
    x = alpha.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * noise
    out = prediction.target(x0, noise, alpha, sigma)
    wrong = out + 0.1
    error = ((prediction.x0(wrong, x, alpha, sigma) - x0) ** 2).flatten(1).mean(1) / 0.01
    assert torch.allclose(error, prediction.x0_gain(alpha, sigma), rtol=1e-6, atol=1e-9)
    error = ((prediction.noise(wrong, x, alpha, sigma) - noise) ** 2).flatten(1).mean(1) / 0.01
    assert torch.allclose(error, prediction.noise_gain(alpha, sigma), rtol=1e-6, atol=1e-9)
