"""Weights: published values, the same loss in every parameterisation, finite at both ends."""

from __future__ import annotations

import pytest
import torch

from ldm.diffusion import (
    P2,
    PREDICTIONS,
    SNR,
    VLB,
    Debiased,
    Discrete,
    Epsilon,
    Flow,
    MinSNR,
    Process,
    Sample,
    SoftMinSNR,
    V,
    Velocity,
)
from ldm.diffusion.likelihood import bound


def test_min_snr_published():
    t = torch.tensor([0, 100, 250])
    got = Process(weighting=MinSNR()).weight(t)
    assert got.tolist() == pytest.approx([0.0042536156, 0.5914434426, 1.0], rel=1e-6)
    got = Process(weighting=MinSNR(), prediction=V()).weight(t)
    assert got.tolist() == pytest.approx([0.00425, 0.5288826121, 0.6737926252], rel=1e-4)


@pytest.mark.parametrize(
    "weighting", [MinSNR(), SNR(), SNR(floor=1.0), P2(), P2(k=0.5, gamma=0.5), VLB(), SoftMinSNR(), Debiased()]
)
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


@pytest.mark.parametrize("weighting", [MinSNR(), SNR(), SNR(floor=1.0), P2(), VLB(), SoftMinSNR(), Debiased()])
def test_finite_where_alpha_is_0(weighting):
    process = Process(schedule=Discrete(zero_terminal_snr=True), prediction=V(), weighting=weighting)
    weight = process.weight(torch.arange(1000))
    assert bool(torch.isfinite(weight).all())
    assert bool((weight >= 0).all())
    if not isinstance(weighting, VLB):
        flow = Process(schedule=Flow(), prediction=Velocity(), weighting=weighting)
        assert bool(torch.isfinite(flow.weight(torch.tensor([0.0, 1.0, 1000.0]))).all())


def snr_of(t: torch.Tensor) -> torch.Tensor:
    """Of Stable Diffusion's betas, float64."""
    bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[t]
    return bar / (1 - bar)


def test_soft_min_snr_is_crowsons():
    """1 / (s^2 + 1 / gamma) on x_0 where s is the noise of data that are not shrunk; a sigmoid on the noise."""
    t = torch.tensor([0, 1, 100, 500, 999])
    snr = snr_of(t)
    for gamma in (4.0, 0.5):
        on_x0 = Process(weighting=SoftMinSNR(gamma=gamma), prediction=Sample()).weight(t)
        assert torch.allclose(on_x0.double(), 1 / (1 / snr + 1 / gamma), rtol=1e-5)
        on_noise = Process(weighting=SoftMinSNR(gamma=gamma)).weight(t).double()
        assert torch.allclose(on_noise, torch.sigmoid(torch.tensor(gamma).log() - snr.log()), rtol=1e-5)
    soft, hard = (Process(weighting=w, prediction=Sample()).weight(t) for w in (SoftMinSNR(gamma=5.0), MinSNR()))
    assert bool((soft < hard).all())
    assert bool((soft > hard / 2.001).all())


def test_debiased_is_published():
    """1 / sqrt(SNR) on the noise (arXiv 2310.08442); alpha sigma on a flow's velocity."""
    t = torch.tensor([0, 1, 100, 500, 999])
    assert torch.allclose(Process(weighting=Debiased()).weight(t).double(), snr_of(t) ** -0.5, rtol=1e-5)
    flow, t = Process(schedule=Flow(), prediction=Velocity(), weighting=Debiased()), torch.tensor([0.0, 250.0, 1000.0])
    assert flow.weight(t).tolist() == pytest.approx([0, 0.25 * 0.75, 0], abs=1e-6)


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
        (lambda: SoftMinSNR(gamma=0), "gamma must be above 0"),
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
