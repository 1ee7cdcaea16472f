"""The diffusion process: q(x_t | x_0), q(x_t | x_{t-1}), q(x_{t-1} | x_t, x_0), the loss per sample, the denoiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from ldm.diffusion.density import (
    CosMap,
    FluxShift,
    Importance,
    LogitNormal,
    Mode,
    ShiftedUniform,
    UniformTimes,
)
from ldm.diffusion.prediction import Epsilon, Sample, V, Velocity, broadcast
from ldm.diffusion.schedule import Discrete, Flow
from ldm.diffusion.shape import Shape, Squared
from ldm.diffusion.weighting import P2, SNR, VLB, X0, CosMapWeight, Debiased, MinSNR, SigmaSqrt, SoftMinSNR, Uniform
from ldm.types import Cond, Denoise, Net

Value = TypeVar("Value", float, Tensor)
_SQUARED = Squared()


class Posterior(NamedTuple):
    """q(x_s | x_t, x_0) = N(on_x x_t + on_x0 x_0, small): the coefficients, floats or tensors."""

    on_x: float | Tensor
    on_x0: float | Tensor
    small: float | Tensor
    """beta_tilde, the variance given x_0; the right one for data that is one point."""
    large: float | Tensor
    """beta, the right one for data that is white noise."""


def posterior(alpha: Value, sigma: Value, alpha_before: Value, sigma_before: Value) -> Posterior:
    """From time t (alpha, sigma) to any earlier time s (`_before`), DDPM eqs. 6 and 7 for strides of any length."""
    step = alpha / alpha_before
    beta = sigma**2 - (step * sigma_before) ** 2
    return Posterior(
        on_x=step * sigma_before**2 / sigma**2,
        on_x0=alpha_before * beta / sigma**2,
        small=beta * sigma_before**2 / sigma**2,
        large=beta,
    )


def interpolate_log_variance(fraction: Tensor, small: Tensor, large: Tensor) -> Tensor:
    """The learned log variance: fraction in [-1, 1] from log `small` to log `large` (improved DDPM, eq. 15).

    `small` must be above 0: at the first step pass the variance of the second (improved DDPM clips so).
    """
    part = (fraction + 1) / 2
    return part * torch.log(large) + (1 - part) * torch.log(small)


def offset_noise(noise: Tensor, offset: Tensor, strength: float) -> Tensor:
    """Noise (B, C, H, W) with a shared normal offset (B, C) per channel, so that the mean brightness is learned too."""
    return noise + strength * offset[:, :, None, None]


def perturb_noise(noise: Tensor, extra: Tensor, strength: float) -> Tensor:
    """The noise to add to the input while the target stays `noise` (input perturbation, arXiv 2301.11706)."""
    return noise + strength * extra


@dataclass(frozen=True, kw_only=True)
class Process:
    """A schedule, what the network predicts, how the loss is weighted and which times it sees.

    `variance` "learned": the network has 2C output channels, the second half is the fraction of
    `interpolate_log_variance`. Randomness comes as arguments.
    """

    schedule: Discrete | Flow = field(default_factory=Discrete)
    """The noise at each time: discrete times or a flow."""
    prediction: Epsilon | V | Sample | Velocity = field(default_factory=Epsilon)
    """What the network predicts."""
    weighting: Uniform | MinSNR | SoftMinSNR | SNR | Debiased | P2 | VLB | X0 | SigmaSqrt | CosMapWeight = field(
        default_factory=Uniform
    )
    """The loss weight of each time."""
    density: UniformTimes | LogitNormal | Mode | CosMap | ShiftedUniform | FluxShift | Importance = field(
        default_factory=UniformTimes
    )
    """Which times training sees, and how often."""
    variance: Literal["fixed", "learned"] = "fixed"

    def __post_init__(self) -> None:
        if self.variance not in ("fixed", "learned"):
            raise ValueError(f"variance must be 'fixed' or 'learned', got {self.variance!r}")
        if isinstance(self.prediction, Epsilon) and self.schedule.at(self.schedule.last)[0] == 0:
            raise ValueError(
                "prediction epsilon says nothing of x_0 where alpha is 0 (zero_terminal_snr, flow); "
                "use v, sample or velocity"
            )
        if isinstance(self.weighting, VLB) and not self.schedule.discrete:
            raise ValueError("weighting vlb needs a discrete schedule")
        if self.variance == "learned" and not self.schedule.discrete:
            raise ValueError("variance 'learned' needs a discrete schedule, got 'flow'")
        if isinstance(self.density, Importance) and not self.schedule.discrete:
            raise ValueError("density importance needs a discrete schedule, got 'flow'")

    def times(self, u: Tensor, tokens: int | None = None, span: tuple[float, float] | None = None) -> Tensor:
        """Uniform u (B,) in [0, 1) -> training times (B,), of pictures of so many image tokens.

        `span`: the times [low, high) between which all are brought, as evenly as before.
        Raises ValueError for density importance, whose times depend on past losses (`ImportanceTimes`), and for
        flux_shift without tokens.
        """
        if isinstance(self.density, Importance):
            raise ValueError(
                "density importance: this loss keeps no history of its losses; use uniform or logit_normal"
            )
        density = self.density
        if isinstance(density, FluxShift):
            if tokens is None:
                raise ValueError("density flux_shift: this loss does not tell the number of image tokens")
            density = density.of_tokens(tokens)
        if span is None:
            return self.schedule.sample(density.warp(u))
        low, high = span
        if self.schedule.discrete:
            return (low + (density.warp(u).double() * (high - low)).floor()).long()
        return low + (high - low) / self.schedule.steps * self.schedule.sample(density.warp(u))

    def fixed_times(self, share: Tensor) -> Tensor:
        """Shares (B,) in [0, 1) of T -> times (B,), whatever the density and the flow's shift."""
        return self.schedule.sample(share) if self.schedule.discrete else self.schedule.steps * share.float()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0) = alpha x_0 + sigma noise (DDPM, eq. 4), computed in float32, in the dtype of x0."""
        alpha, sigma = (broadcast(v, x0) for v in self.schedule.alpha_sigma(t, _wide(x0)))
        return (alpha * x0 + sigma * noise).to(x0.dtype)

    def add_noise_step(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_{t-1}) = sqrt(1 - beta_t) x + sqrt(beta_t) noise (DDPM, eq. 2), for any schedule."""
        wide = _wide(x)
        alpha, sigma = self.schedule.alpha_sigma(t, torch.float64)
        alpha_before, sigma_before = self.before(t, torch.float64)
        step = alpha / alpha_before
        spread = (sigma**2 - (step * sigma_before) ** 2).clamp(min=0).sqrt()
        return (broadcast(step.to(wide), x) * x + broadcast(spread.to(wide), x) * noise).to(x.dtype)

    def before(self, t: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) one training time closer to the data; (1, 0) before the first."""
        alpha, sigma = self.schedule.alpha_sigma((t - 1).clamp(min=0), dtype)
        clean = t < 1
        return torch.where(clean, torch.ones_like(alpha), alpha), torch.where(clean, torch.zeros_like(sigma), sigma)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should answer, float32."""
        alpha, sigma = self.schedule.alpha_sigma(t, _wide(x0))
        return self.prediction.target(x0.to(alpha.dtype), noise.to(alpha.dtype), alpha, sigma)

    def weight(self, t: Tensor) -> Tensor:
        """The loss weight of each time, (B,) float32."""
        alpha, sigma = self.schedule.alpha_sigma(t, torch.float64)
        before = self.before(t, torch.float64) if isinstance(self.weighting, VLB) else None
        return self.weighting.weight(alpha, sigma, self.prediction, before).float()

    def loss(
        self,
        out: Tensor,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        region: Tensor | None = None,
        *,
        shape: Shape = _SQUARED,
        whole_area: bool = False,
    ) -> Tensor:
        """Weighted error (B,) float32: the mean over all but the batch axis comes first, then the weight.

        `region` (B, 1, H, W): weights of pixels in that mean, which is over their sum, or over the `whole_area`.
        `shape`: what an error costs.
        """
        error = shape.cost(out.float() - self.target(x0, noise, t).float(), t, self.schedule)
        if region is not None and whole_area:
            error = error * region
        if region is None or whole_area:
            return error.flatten(1).mean(1) * self.weight(t)
        whole = region.float().flatten(1).sum(1).clamp(min=torch.finfo(torch.float32).tiny)
        return (error * region).mean(1).flatten(1).sum(1) / whole * self.weight(t)

    def denoiser(self, net: Net) -> Denoise:
        """The network as an estimate of x_0, in the dtype of x; a `LearnedDenoise` if its variance is learned."""
        if self.variance == "learned":
            return self.learned_denoiser(net)

        def denoise(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return self._estimate(net(x, t, cond), x, t)

        return denoise

    def learned_denoiser(self, net: Net) -> LearnedDenoise:
        """For a network with 2C output channels, the second half the learned variance's fraction in [-1, 1].

        The denoiser raises ValueError for another number of channels.
        """

        def both(x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
            mean, fraction = halves(net(x, t, cond), x)
            return self._estimate(mean, x, t), fraction.to(x.dtype)

        return LearnedDenoise(both)

    def _estimate(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.schedule.alpha_sigma(t, _wide(x), check=False)
        return self.prediction.x0(out.to(alpha.dtype), x, alpha, sigma).to(x.dtype)


@dataclass(frozen=True)
class LearnedDenoise:
    """A `Denoise` that can also give the learned variance's fraction (improved DDPM, section 3.1)."""

    both: Callable[[Tensor, Tensor, Cond], tuple[Tensor, Tensor]]
    """(x, t, cond) -> (x_0 estimate, fraction), each shaped as x."""

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.both(x, t, cond)[0]


def halves(out: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean's part, fraction) of an output (B, 2C, ...) at x (B, C, ...). Raises ValueError for other channels."""
    if out.shape[1] != 2 * x.shape[1]:
        raise ValueError(f"learned variance needs {2 * x.shape[1]} output channels, got {out.shape[1]}")
    mean, fraction = out.chunk(2, dim=1)
    return mean, fraction


def _wide(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)
