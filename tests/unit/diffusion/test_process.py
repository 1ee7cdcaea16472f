"""The forward process and its posterior, against closed forms and by sampling."""

from __future__ import annotations

import pytest
import torch

from ldm.diffusion import Discrete, LogitNormal, Process, Velocity, posterior
from ldm.diffusion.process import interpolate_log_variance, offset_noise, perturb_noise
from ldm.diffusion.schedule import Flow

KINDS = ["linear", "quadratic", "scaled_linear", "cosine", "sigmoid"]


@pytest.mark.parametrize("kind", KINDS)
def test_steps_compose_to_the_direct_noise(kind):
    """q(x_t | x_{t-1}) applied t times is q(x_t | x_0): the coefficients exactly, the moments by sampling."""
    schedule = Discrete(betas=kind, steps=12, beta_start=0.01, beta_end=0.3)
    process = Process(schedule=schedule)
    g = torch.Generator().manual_seed(0)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    mean, variance = one, zero
    x = torch.full((20000, 1), 1.5, dtype=torch.float64)
    for t in range(12):
        time = torch.tensor([t])
        mean = process.add_noise_step(mean, zero, time)
        gain, spread = process.add_noise_step(one, zero, time), process.add_noise_step(zero, one, time)
        variance = gain**2 * variance + spread**2
        noise = torch.randn(20000, 1, generator=g, dtype=torch.float64)
        x = process.add_noise_step(x, noise, time.expand(20000))
        alpha, sigma = schedule.at(t)
        assert float(mean) == pytest.approx(alpha, abs=1e-9)
        assert float(variance) == pytest.approx(sigma**2, rel=1e-9)
    assert float(x.mean()) == pytest.approx(1.5 * alpha, abs=4 * sigma / 20000**0.5)
    assert float(x.var()) == pytest.approx(sigma**2, rel=0.04)


@pytest.mark.parametrize(("t", "s"), [(5, 4), (9, 3), (11, 0)])
def test_posterior_by_bayes(t, s):
    """q(x_s | x_t, x_0) is the product of two Gaussians, written out; and by regression on samples."""
    schedule = Discrete(steps=12, beta_start=0.01, beta_end=0.3)
    (alpha, sigma), (alpha_s, sigma_s) = schedule.at(t), schedule.at(s)
    q = posterior(alpha, sigma, alpha_s, sigma_s)
    step = alpha / alpha_s
    beta = sigma**2 - step**2 * sigma_s**2
    precision = 1 / sigma_s**2 + step**2 / beta
    assert q.small == pytest.approx(1 / precision)
    assert q.on_x == pytest.approx(step / beta / precision)
    assert q.on_x0 == pytest.approx(alpha_s / sigma_s**2 / precision)
    g = torch.Generator().manual_seed(0)
    x0, first, second = torch.randn(3, 40000, generator=g, dtype=torch.float64)
    x_s = alpha_s * x0 + sigma_s * first
    x_t = step * x_s + beta**0.5 * second
    fit = torch.linalg.lstsq(torch.stack([x_t, x0], 1), x_s[:, None])
    rest = x_s - torch.stack([x_t, x0], 1) @ fit.solution[:, 0]
    assert fit.solution[:, 0].tolist() == pytest.approx([q.on_x, q.on_x0], abs=0.02)
    assert float(rest.var()) == pytest.approx(q.small, rel=0.04)


def test_posterior_variances_published():
    """beta_tilde of DDPM's linear schedule at t = 0, 487, 999."""
    schedule = Discrete(betas="linear", beta_start=1e-4, beta_end=0.02)
    values = []
    for t in (0, 487, 999):
        before = schedule.at(t - 1) if t else (1.0, 0.0)
        values.append(posterior(*schedule.at(t), *before).small)
    assert values == pytest.approx([0.0, 0.00979, 0.02], abs=1e-5)


def test_learned_variance_interpolates_logs():
    small, large = torch.tensor(0.01), torch.tensor(0.04)
    got = interpolate_log_variance(torch.tensor([-1.0, 0.0, 1.0]), small, large).exp()
    assert got.tolist() == pytest.approx([0.01, 0.02, 0.04])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_data_meets_exact_tables(dtype):
    """The tables are not rounded to the data's type: sigma[0] would be 0 in bfloat16."""
    x0 = torch.zeros(1, 1, 64, 64, dtype=dtype)
    noise = torch.ones_like(x0)
    x = Process().add_noise(x0, noise, torch.tensor([0]))
    assert x.dtype == dtype
    assert float(x.float().mean()) == pytest.approx(0.0291547, rel=4e-3)


def test_loss_is_float32_and_per_sample():
    process = Process(schedule=Flow(), prediction=Velocity(), density=LogitNormal())
    out = torch.zeros(2, 1, 2, 2, dtype=torch.bfloat16)
    x0, noise = torch.zeros(2, 1, 2, 2), torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    loss = process.loss(out, x0, noise, torch.tensor([100.0, 900.0]))
    assert loss.dtype == torch.float32
    assert loss.tolist() == [1.0, 4.0]
    u = torch.linspace(0, 1, 101)[1:-1]
    times = process.times(u)
    assert float(times.median()) == pytest.approx(500, abs=1)
    assert float(((times > 268.9) & (times < 731.1)).float().mean()) == pytest.approx(0.683, abs=0.02)


def test_offset_and_perturbation():
    noise = torch.zeros(2, 3, 4, 4)
    offset = torch.arange(6.0).view(2, 3)
    assert torch.equal(offset_noise(noise, offset, 0.1)[1, 2], torch.full((4, 4), 0.5))
    g = torch.Generator().manual_seed(0)
    base, extra = torch.randn(2, 1, 1, 200, 200, generator=g)
    assert float(perturb_noise(base, extra, 0.1).var()) == pytest.approx(1.01, abs=0.02)
