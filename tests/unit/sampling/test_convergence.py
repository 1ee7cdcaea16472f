"""Every sampler on Gaussian data, where the probability-flow ODE and the reverse chain are known exactly."""

from __future__ import annotations

import math

import pytest
import torch

from ldm.diffusion import Discrete, Flow, Process, V, Velocity
from ldm.sampling import SAMPLERS, sample

SCHEDULE = Discrete()
STD = 0.5
DETERMINISTIC = [name for name, info in SAMPLERS.items() if not info.stochastic]
# Distilled networks answer with the end of the path, which E[x_0 | x] is not; learned variance has its own test.
CHAINS = [name for name, info in SAMPLERS.items() if info.stochastic and name not in ("lcm", "tcd", "ddpm_learned")]


def exact(schedule, std=STD, mean=0.0):
    """E[x_0 | x_t] for data N(mean, std^2), float64."""

    def denoise(x, t, cond):
        alpha, sigma = (v.view(-1, 1, 1, 1) for v in schedule.alpha_sigma(t, torch.float64))
        return mean + alpha * std**2 * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    return denoise


def even_in_lam(n):
    """n + 1 times from the last to the first, evenly spaced in log(alpha / sigma)."""
    (high_a, high_s), (low_a, low_s) = SCHEDULE.at(0), SCHEDULE.at(999)
    high, low = math.log(high_a / high_s), math.log(low_a / low_s)
    inner = [SCHEDULE.time(low + (high - low) * i / n) for i in range(1, n)]
    return [999.0, *inner, 0.0]


def error(name, n):
    """Deviation from the exact end of the ODE, x_T times the ratio of the marginals' standard deviations."""
    (a, s), (b, r) = SCHEDULE.at(999), SCHEDULE.at(0)
    truth = math.sqrt((b**2 * STD**2 + r**2) / (a**2 * STD**2 + s**2))
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    path = even_in_lam(n)
    got = sample(name, exact(SCHEDULE), x, {}, schedule=SCHEDULE, steps=n, times=path, noise=lambda i: x, end="first")
    return abs(float(got) - truth)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_convergence(name):
    """Halving the steps divides the error by 2^order, as the table of samplers says."""
    coarse, fine = error(name, 40), error(name, 80)
    order = math.log2(coarse / fine)
    print(f"{name}: {order:.2f} measured, {SAMPLERS[name].order} in the table, error {fine:.1e}")
    assert order > SAMPLERS[name].order - 0.5
    assert fine < {1: 1e-2, 2: 1e-3}.get(SAMPLERS[name].order, 1e-4)


def test_ddim_with_eta_1_is_ddpm():
    """Not only in distribution: with the same noise the same numbers, strided too (DDIM, eq. 16)."""
    x = torch.randn(4, 1, 2, 2, dtype=torch.float64)

    def noise(i):
        return torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(i), dtype=torch.float64)

    for steps in (1, 13, 100):
        results = [
            sample(name, exact(SCHEDULE), x, {}, schedule=SCHEDULE, steps=steps, noise=noise, **options)
            for name, options in (("ddpm", {}), ("ddim", {"eta": 1.0}))
        ]
        assert torch.allclose(*results, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in CHAINS), ("ddim", {"eta": 0.5}), ("ddim", {"eta": 1.0})]
)
def test_stochastic_samplers_reach_the_distribution(name, options):
    """Mean and standard deviation of 20,000 samples, up to the error of 200 steps (even in log-SNR) and of counting."""
    shape = (5, 1, 64, 64)

    def noise(i):
        return torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)

    got = sample(
        name,
        exact(SCHEDULE, mean=0.7),
        noise(9999),
        {},
        schedule=SCHEDULE,
        steps=200,
        times=even_in_lam(200),
        noise=noise,
        **options,
    )
    print(f"{name}: mean {float(got.mean()):.4f} of 0.7, std {float(got.std()):.4f} of {STD}")
    # Starting from N(0, 1) instead of q(x_T) costs alpha_T * 0.7 of the mean's path, which the chain forgets.
    assert float(got.mean()) == pytest.approx(0.7, abs=0.02)
    assert float(got.std()) == pytest.approx(STD, rel=0.04)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "ddpm_learned"])
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(Discrete(zero_terminal_snr=True), V()), (Flow(), Velocity()), (Flow(shift=3.0), Velocity())],
)
def test_starts_without_signal(schedule, prediction, steps, name):
    """From alpha = 0 (infinite log-SNR) to data that are one point: every sampler lands on it."""
    point = torch.full((2, 3, 2, 2), 0.3)

    def net(x, t, cond):
        alpha, sigma = (v.view(-1, 1, 1, 1) for v in schedule.alpha_sigma(t))
        noise = (x - alpha * point) / sigma.clamp(min=1e-20)
        return prediction.target(point, noise, alpha, sigma)

    denoise = Process(schedule=schedule, prediction=prediction).denoiser(net)
    got = sample(
        name,
        denoise,
        torch.randn(2, 3, 2, 2),
        {},
        schedule=schedule,
        steps=steps,
        spacing="lcm" if name in ("lcm", "tcd") else "trailing",
        noise=lambda i: torch.randn(2, 3, 2, 2),
        end="data",
    )
    if name == "lcm":  # its boundary mixes in a little of x at t > 0
        assert torch.allclose(got, point, atol=1e-2)
    else:
        assert torch.allclose(got, point, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "ddpm_learned"])
def test_same_noise_same_sample_at_any_batch_size(name):
    start = torch.randn(5, 2, 4, 4)

    def noise(rows):
        return lambda i: torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(i))[rows]

    denoise = Process().denoiser(lambda x, t, cond: torch.sin(x + t.view(-1, 1, 1, 1) / 300))
    whole = sample(name, denoise, start, {}, schedule=SCHEDULE, steps=6, noise=noise(slice(0, 5)))
    for rows in (slice(0, 1), slice(1, 3), slice(3, 5)):
        part = sample(name, denoise, start[rows], {}, schedule=SCHEDULE, steps=6, noise=noise(rows))
        assert torch.allclose(part, whole[rows], atol=1e-6)


def test_learned_variance_ends_are_small_and_large():
    """Fractions -1 and 1 give the two fixed variances, with the same noise the same numbers."""

    def noise(i):
        return torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(i))

    process = Process()

    def run(name, denoise):
        return sample(name, denoise, noise(99), {}, schedule=SCHEDULE, steps=9, noise=noise)

    def net(x, t, cond):
        return torch.sin(x)

    for fraction, name in ((-1.0, "ddpm"), (1.0, "ddpm_large")):
        learned = process.learned_denoiser(lambda x, t, c, f=fraction: torch.cat([net(x, t, c), 0 * x + f], 1))
        assert torch.allclose(run("ddpm_learned", learned), run(name, process.denoiser(net)), atol=1e-5)


@pytest.mark.parametrize("name", ["dpm_solver_3s", "dpmpp_3m", "deis", "unipc_3", "heun"])
def test_few_steps_beat_ddim(name):
    """What higher orders are for: at equal steps the error is a tenth of DDIM's or less."""
    assert error(name, 20) < 0.2 * error("ddim", 20)
