"""Training on flows: distribution functions of the densities, what shifts do to them, and weights in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from scipy import integrate, optimize, stats

from ldm.config.load import decode, encode
from ldm.diffusion import (
    X0,
    CosMap,
    CosMapWeight,
    DynamicShift,
    Flow,
    FluxShift,
    LogitNormal,
    Mode,
    Process,
    ShiftedUniform,
    SigmaSqrt,
    Uniform,
    UniformTimes,
    Velocity,
)

EVEN = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000


def distance(density, cdf):
    """Kolmogorov-Smirnov's, of the density's quantiles: 1 / 8000 if the distribution function is right."""
    return stats.kstest(density.warp(EVEN).numpy(), cdf).statistic


def shifted(t, s):
    """The distribution function of s u / (1 + (s - 1) u)."""
    return t / (s - (s - 1) * t)


@pytest.mark.parametrize("scale", [-0.9, -0.3, 0.0, 0.81, 1.29, 1.75])
def test_mode(scale):
    """The published curve falls from 1 to 0 as its v rises, so that P(t <= x) is 1 - its inverse at x."""

    def curve(v):
        return 1 - v - scale * (math.cos(math.pi / 2 * v) ** 2 - 1 + v)

    def cdf(x):
        return np.array([1 - optimize.brentq(lambda v, t=t: curve(v) - t, 0, 1, xtol=1e-14) for t in x])

    assert distance(Mode(scale=scale), cdf) < 2e-4
    assert bool((Mode(scale=scale).warp(EVEN).diff() >= 0).all())


def test_cosmap():
    """Its density is that of eq. 21, integrated; and it is a cosine schedule's log-SNR, 2 log cot(pi u / 2)."""
    whole = integrate.quad(lambda t: 2 / (math.pi * (1 - 2 * t + 2 * t * t)), 0, 1)[0]
    assert whole == pytest.approx(1, abs=1e-9)
    assert distance(CosMap(), lambda t: 2 / math.pi * np.arctan(2 * t - 1) + 0.5) < 2e-4
    t = CosMap().warp(EVEN)
    assert torch.allclose((1 - t) / t, 1 / torch.tan(math.pi / 2 * EVEN), rtol=1e-9)


@pytest.mark.parametrize("s", [0.5, 1.0, 3.0, 6.0])
def test_shifted_uniform(s):
    assert distance(ShiftedUniform(shift=s), lambda t: shifted(t, s)) < 2e-4


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (4096, 1.15), (2176, 0.825), (1024, 0.63)])
def test_flux_shift(tokens, mu):
    """logit(t) ~ N(mu, std^2) with mu on FLUX's line, or uniform times shifted by e^mu."""
    t = FluxShift(std=0.8).of_tokens(tokens).warp(EVEN)
    assert stats.kstest((t.log() - (-t).log1p()).numpy(), stats.norm(mu, 0.8).cdf).statistic < 2e-4
    even = FluxShift(base="uniform").of_tokens(tokens)
    assert distance(even, lambda t: shifted(t, math.exp(mu))) < 2e-4


@pytest.mark.parametrize(
    ("density", "scheme"),
    [(UniformTimes(), {"weighting_scheme": "none"}),
     (LogitNormal(mean=-0.4, std=0.7), {"weighting_scheme": "logit_normal", "logit_mean": 0.4, "logit_std": 0.7}),
     (Mode(), {"weighting_scheme": "mode", "mode_scale": 1.29})],
)  # fmt: skip
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_what_diffusers_draws(density, scheme, shift):
    """Their u is an index into the scheduler's shifted table, counted from the noise: our 1 - u, shifted once."""
    import diffusers

    count = 40000
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    u = compute_density_for_timestep_sampling(batch_size=count, generator=torch.Generator().manual_seed(0), **scheme)
    theirs = scheduler.timesteps[(u * 1000).long()]
    process = Process(schedule=Flow(shift=shift), prediction=Velocity(), density=density)
    ours = process.times((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    assert stats.ks_2samp(theirs.numpy(), ours.numpy()).statistic < 0.012


def test_shifts_multiply_and_a_dynamic_one_is_not_in_training():
    both = Process(schedule=Flow(shift=2.0), prediction=Velocity(), density=ShiftedUniform(shift=3.0))
    assert stats.kstest(both.times(EVEN).numpy() / 1000, lambda t: shifted(t, 6.0)).statistic < 2e-4
    dynamic = Flow(shift=3.0, dynamic=DynamicShift())
    plain = Process(schedule=dynamic, prediction=Velocity())
    assert torch.equal(plain.times(EVEN), 1000 * EVEN)
    flux = Process(schedule=dynamic, prediction=Velocity(), density=FluxShift())
    t = flux.times(EVEN, 4096) / 1000
    assert stats.kstest((t.log() - (-t).log1p()).numpy(), stats.norm(1.15, 1).cdf).statistic < 2e-4
    with pytest.raises(ValueError, match="does not tell the number of image tokens"):
        flux.times(EVEN)


@pytest.mark.parametrize("density", [Mode(), CosMap(), ShiftedUniform(), LogitNormal()])
def test_ends(density):
    """Never pure noise exactly, in float32 too, and never outside."""
    t = density.warp(torch.tensor([0.0, 1e-7, 1 - 6e-8, 1.0]))
    assert t.dtype == torch.float32
    assert bool(((t >= 0) & (t < 1)).all())


def velocities():
    g = torch.Generator().manual_seed(0)
    x0, noise, out = torch.randn(3, 6, 4, 8, 8, generator=g, dtype=torch.float64)
    t = torch.tensor([1.0, 120.0, 333.0, 500.0, 850.0, 1000.0], dtype=torch.float64)
    sigma = t / 1000
    return x0, noise, out, t, sigma


@pytest.mark.parametrize(
    ("weighting", "scheme", "outputs"),
    [(Uniform(), "none", False), (X0(), "none", True), (SigmaSqrt(), "sigma_sqrt", False),
     (SigmaSqrt(of="x0"), "sigma_sqrt", True), (CosMapWeight(), "cosmap", False),
     (CosMapWeight(of="x0"), "cosmap", True)],
)  # fmt: skip
def test_weights_are_diffusers(weighting, scheme, outputs):
    """Their loss on the velocity, and on -sigma v + x_t against x_0 (`precondition_outputs`), written out."""
    x0, noise, out, t, sigma = velocities()
    wide = sigma.view(-1, 1, 1, 1)
    answer, target = out, noise - x0
    if outputs:
        answer, target = out * (-wide) + ((1 - wide) * x0 + wide * noise), x0
    weight = compute_loss_weighting_for_sd3(scheme, sigma)
    want = (weight.view(-1, 1, 1, 1) * (answer - target) ** 2).flatten(1).mean(1)
    process = Process(schedule=Flow(), prediction=Velocity(), weighting=weighting)
    assert torch.allclose(process.loss(out, x0, noise, t).double(), want, rtol=1e-5)


def test_sigma_sqrt_of_x0_is_the_velocity_also_at_the_data():
    t = torch.tensor([0.0, 0.5, 1000.0])
    process = Process(schedule=Flow(), prediction=Velocity(), weighting=SigmaSqrt(of="x0"))
    assert process.weight(t).tolist() == [1.0, 1.0, 1.0]
    on_output = Process(schedule=Flow(), prediction=Velocity(), weighting=SigmaSqrt()).weight(t)
    assert on_output.tolist() == pytest.approx([1e6, 1e6, 1.0])


def test_configs_name_them():
    """As a run's YAML has them."""
    process = Process(
        schedule=Flow(dynamic=DynamicShift(max_shift=0.9), terminal=0.02),
        prediction=Velocity(),
        density=FluxShift(std=1.5, dynamic=DynamicShift(base_shift=0.4)),
        weighting=CosMapWeight(of="x0"),
    )
    assert decode(Process, encode(process)) == process
    for density in (Mode(scale=0.5), CosMap(), ShiftedUniform(shift=2.0)):
        process = Process(schedule=Flow(), prediction=Velocity(), density=density)
        assert decode(Process, encode(process)) == process


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mode(scale=2.0), r"scale must lie in \[-1, 1.7519\], got 2.0"),
        (lambda: ShiftedUniform(shift=0.0), "shift must be above 0"),
        (lambda: FluxShift(std=0.0), "std must be above 0"),
        (lambda: FluxShift(base="odd"), "base must be 'logit_normal' or 'uniform'"),  # pyright: ignore
        (lambda: SigmaSqrt(of="odd"), "of must be 'output' or 'x0'"),  # pyright: ignore
        (lambda: Flow(terminal=1.0), r"terminal must lie in \(0, 1\)"),
        (lambda: DynamicShift(base_image_seq_len=0), "must satisfy 0 < base < max"),
        (lambda: DynamicShift(mu="odd"), "mu must be 'linear' or 'flux2'"),  # pyright: ignore
        (lambda: DynamicShift(base_shift=-1, max_shift=-0.5, time_shift_type="linear").shift(300), "must be above 0"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
