"""Weights: published values, the same loss in every parameterisation, finite at both ends."""

from __future__ import annotations

import pytest
import torch

from ldm.diffusion import P2, PREDICTIONS, SNR, VLB, Discrete, Epsilon, Flow, MinSNR, Process, V, Velocity
from ldm.diffusion.likelihood import bound


def test_min_snr_published():
    t = torch.tensor([0, 100, 250])
    got = Process(weighting=MinSNR()).weight(t)
    assert got.tolist() == pytest.approx([0.0042536156, 0.5914434426, 1.0], rel=1e-6)
    got = Process(weighting=MinSNR(), prediction=V()).weight(t)
    assert got.tolist() == pytest.approx([0.00425, 0.5288826121, 0.6737926252], rel=1e-4)


@pytest.mark.parametrize("weighting", [MinSNR(), SNR(), SNR(floor=1.0), P2(), P2(k=0.5, gamma=0.5), VLB()])
def test_one_loss_for_every_parameterisation(weighting):
    """Networks that make the same error of x_0 have the same weighted loss, whatever they predict."""
    g = torch.Generator().manual_seed(0)
    x0, noise, wrong = (torch.randn(5, 2, 4, 4, generator=g, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([1, 50, 400, 900, 999])
    losses = []
    for name, prediction in PREDICTIONS.items():
        if name == "velocity" and isinstance(weighting, VLB):
            continue
        process = Process(prediction=prediction, weighting=weighting)
        x = process.add_noise(x0, noise, t)
        alpha, sigma = process.schedule.alpha_sigma(t, torch.float64)
        estimate = x0 + 0.1 * wrong
        implied = (x - alpha.view(-1, 1, 1, 1) * estimate) / sigma.view(-1, 1, 1, 1)
        losses.append(process.loss(prediction.target(estimate, implied, alpha, sigma), x0, noise, t))
    for loss in losses[1:]:
        assert torch.allclose(loss, losses[0], rtol=2e-3)


@pytest.mark.parametrize("weighting", [MinSNR(), SNR(), SNR(floor=1.0), P2(), VLB()])
def test_finite_where_alpha_is_0(weighting):
    process = Process(schedule=Discrete(zero_terminal_snr=True), prediction=V(), weighting=weighting)
    weight = process.weight(torch.arange(1000))
    assert bool(torch.isfinite(weight).all())
    assert bool((weight >= 0).all())
    if not isinstance(weighting, VLB):
        flow = Process(schedule=Flow(), prediction=Velocity(), weighting=weighting)
        assert bool(torch.isfinite(flow.weight(torch.tensor([0.0, 1.0, 1000.0]))).all())


def test_vlb_weight_is_the_bound():
    """Summed over t > 0, the weighted squared error of the noise is the bound's sum of L_{t-1} (DDPM, eq. 12)."""
    process = Process(schedule=Discrete(steps=20, beta_start=0.01, beta_end=0.3), weighting=VLB())
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(3, 1, 4, 4, generator=g, dtype=torch.float64)
    draws = [torch.randn(3, 1, 4, 4, generator=g, dtype=torch.float64) for _ in range(20)]

    def net(x, t, cond):
        return torch.sin(x + t.view(-1, 1, 1, 1))

    terms = bound(process, process.denoiser(net), x0, {}, noise=lambda i: draws[i])
    total = torch.zeros(3)
    for t in range(1, 20):
        time = torch.full((3,), t)
        x = process.add_noise(x0, draws[t], time)
        total += process.loss(net(x, time.float(), {}), x0, draws[t], time) * 16
    assert torch.allclose(terms.steps.sum(1).float(), total, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MinSNR(gamma=0), "gamma must be above 0"),
        (lambda: SNR(floor=-1), "floor must be at least 0"),
        (lambda: P2(k=0), "k must be above 0"),
        (lambda: VLB(variance="odd"), "variance must be"),
        (lambda: Process(schedule=Flow(), prediction=Velocity(), weighting=VLB()), "vlb needs a discrete"),
        (lambda: Process(schedule=Flow(), prediction=Epsilon()), "says nothing of x_0"),
        (lambda: Process(schedule=Discrete(zero_terminal_snr=True)), "says nothing of x_0"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
