"""The variational bound on the negative log-likelihood: L_T, L_{t-1}, L_0, bits per dimension (DDPM, eq. 5).

All terms are in nats per sample, summed over dimensions. A strided list of times gives the bound of the process that
only has those times. Randomness comes as an argument: `noise(i)` is the standard normal of the i-th time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.prediction import broadcast
from ldm.diffusion.process import LearnedDenoise, Process, halves, interpolate_log_variance, posterior
from ldm.diffusion.schedule import Schedule
from ldm.types import Cond, Denoise

Variance = Literal["small", "large", "learned"]


def normal_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)), elementwise, in nats."""
    spread = torch.exp(log_var1 - log_var2) + (mean1 - mean2) ** 2 * torch.exp(-log_var2)
    return 0.5 * (spread - 1 + log_var2 - log_var1)


def gaussian_nll(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """-log density of N(mean, var) at x, elementwise, in nats."""
    return 0.5 * ((x - mean) ** 2 * torch.exp(-log_var) + log_var + math.log(2 * math.pi))


def discrete_nll(x: Tensor, mean: Tensor, log_var: Tensor, bins: int = 256) -> Tensor:
    """-log mass of the bin around x, for x on `bins` even levels in [-1, 1]; the outer bins are open (DDPM, eq. 13)."""
    if bins < 2:
        raise ValueError(f"bins must be at least 2, got {bins}")
    half = 1 / (bins - 1)
    scale = torch.exp(-0.5 * log_var)
    upper, lower = (x - mean + half) * scale, (x - mean - half) * scale
    # In the upper half use 1 - cdf, so that both ends keep their precision.
    flip = x > mean
    high = torch.where(flip, torch.special.log_ndtr(-lower), torch.special.log_ndtr(upper))
    low = torch.where(flip, torch.special.log_ndtr(-upper), torch.special.log_ndtr(lower))
    inner = high + torch.log(-torch.expm1((low - high).clamp(max=-1e-12)))
    first, last = x <= -1 + half, x >= 1 - half
    mass = torch.where(first, torch.special.log_ndtr(upper), torch.where(last, torch.special.log_ndtr(-lower), inner))
    return -mass


@dataclass(frozen=True)
class Bound:
    """The terms of the bound, nats per sample, summed over dimensions."""

    prior: Tensor
    """L_T (B,)"""
    steps: Tensor
    """L_{t-1} (B, N - 1), from the first pair of times to the last"""
    decoder: Tensor
    """L_0 (B,)"""
    dimensions: int

    @property
    def total(self) -> Tensor:
        """The bound (B,) in nats."""
        return self.prior + self.steps.sum(1) + self.decoder

    @property
    def bits_per_dim(self) -> Tensor:
        """(B,)"""
        return self.total / (self.dimensions * math.log(2))


def prior_term(x0: Tensor, alpha: float, sigma: float) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)), (B,)."""
    zero = x0.new_zeros(())
    variance = x0.new_tensor(2 * math.log(sigma))
    return normal_kl(alpha * x0, variance, zero, zero).flatten(1).sum(1)


def first_variance(schedule: Schedule, times: Sequence[float]) -> float:
    """beta_tilde of the second time, which stands for the first's 0 (improved DDPM clips so)."""
    if len(times) < 2:
        return schedule.at(times[0])[1] ** 2
    q = posterior(*schedule.at(times[1]), *schedule.at(times[0]))
    return float(q.small)


def bound(
    process: Process,
    denoise: Denoise,
    x0: Tensor,
    cond: Cond,
    *,
    noise: Callable[[int], Tensor],
    times: Sequence[float] | None = None,
    variance: Variance = "small",
    bins: int | None = 256,
) -> Bound:
    """All terms at data x0 (B, ...). `times` increase (default: all of a discrete schedule); one network call each.

    `bins` None takes x0 as continuous, with the Gaussian's density as decoder. Raises ValueError for times that do
    not increase, an unknown variance, or "learned" without a denoiser from `Process.learned_denoiser`.
    """
    schedule = process.schedule
    if times is None:
        if not schedule.discrete:
            raise ValueError("times must be given for a schedule that is not discrete")
        times = [float(t) for t in range(schedule.steps)]
    times = [float(t) for t in times]
    if not times or any(b <= a for a, b in itertools.pairwise(times)):
        raise ValueError("times must be strictly increasing and not empty")
    if variance not in ("small", "large", "learned"):
        raise ValueError(f"variance {variance!r} is not one of ['large', 'learned', 'small']")
    if variance == "learned" and not isinstance(denoise, LearnedDenoise):
        raise ValueError("variance 'learned' needs a denoiser from Process.learned_denoiser")
    floor = first_variance(schedule, times)
    terms = []
    for i, t in enumerate(times):
        before = schedule.at(times[i - 1]) if i else (1.0, 0.0)
        terms.append(_term(process, denoise, x0, cond, noise(i), t, before, variance, floor, bins))
    size = x0[0].numel()
    steps = torch.stack(terms[1:], 1) if len(terms) > 1 else x0.new_zeros(len(x0), 0)
    return Bound(prior_term(x0, *schedule.at(times[-1])), steps, terms[0], size)


def _term(
    process: Process,
    denoise: Denoise,
    x0: Tensor,
    cond: Cond,
    noise: Tensor,
    t: float,
    before: tuple[float, float],
    variance: Variance,
    floor: float,
    bins: int | None,
) -> Tensor:
    """L_{t-1}, or L_0 where `before` is the data, (B,)."""
    alpha, sigma = process.schedule.at(t)
    x = alpha * x0 + sigma * noise.to(x0)
    time = torch.full((len(x0),), t, dtype=torch.float32, device=x0.device)
    q = posterior(alpha, sigma, *before)
    small = x0.new_tensor(float(q.small) if before[1] > 0 else floor)
    large = x0.new_tensor(float(q.large))
    if isinstance(denoise, LearnedDenoise) and variance == "learned":
        estimate, fraction = denoise.both(x, time, cond)
        log_var = interpolate_log_variance(fraction, small, large)
    else:
        estimate = denoise(x, time, cond)
        log_var = torch.log(small if variance == "small" else large)
    mean = q.on_x * x + q.on_x0 * estimate
    if before[1] > 0:
        true = q.on_x * x + q.on_x0 * x0
        value = normal_kl(true, torch.log(small), mean, log_var)
    elif bins is None:
        value = gaussian_nll(x0, mean, log_var)
    else:
        value = discrete_nll(x0, mean, log_var, bins)
    return value.expand_as(x0).flatten(1).sum(1)


def hybrid_loss(
    process: Process,
    out: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    weight: float = 0.001,
    added: Tensor | None = None,
) -> Tensor:
    """L_simple + weight L_vlb (B,) for a network with 2C channels (improved DDPM, eq. 16).

    The bound's gradient reaches only the variance: the mean is detached. L_vlb is T times the term at t in bits per
    dimension, an unbiased estimate of the whole bound; integer t (B,). `added` is the noise in x_t where it is not the
    target (input perturbation).
    """
    mean_out, fraction = halves(out.float(), x0)
    term = variance_term(process, mean_out.detach(), fraction, x0, noise if added is None else added, t)
    return process.loss(mean_out, x0, noise, t) + weight * process.schedule.steps * term


def variance_term(process: Process, mean_out: Tensor, fraction: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The bound's term at each sample's t with learned variance, in bits per dimension (B,)."""
    x0, noise = x0.float(), noise.float()
    schedule = process.schedule
    alpha, sigma = (broadcast(v, x0) for v in schedule.alpha_sigma(t, torch.float64))
    before = tuple(broadcast(v, x0) for v in process.before(t, torch.float64))
    q = posterior(alpha, sigma, before[0], before[1])
    first = before[1] == 0
    floor = first_variance(schedule, [schedule.first, schedule.first + 1])
    small = torch.where(first, torch.full_like(sigma, floor), torch.as_tensor(q.small))
    log_small, log_large = torch.log(small), torch.log(torch.as_tensor(q.large))
    log_var = interpolate_log_variance(fraction.double(), small, torch.as_tensor(q.large)).float()
    x = (alpha * x0 + sigma * noise).float()
    estimate = process.prediction.x0(mean_out, x, alpha.float(), sigma.float())
    on_x, on_x0 = (torch.as_tensor(v).float() for v in (q.on_x, q.on_x0))
    mean = on_x * x + on_x0 * estimate
    kl = normal_kl(on_x * x + on_x0 * x0, torch.minimum(log_small, log_large).float(), mean, log_var)
    value = torch.where(first, discrete_nll(x0, mean, log_var), kl)
    return value.flatten(1).mean(1) / math.log(2)
