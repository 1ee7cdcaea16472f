"""Loss weights, each given relative to the plain squared error of the network's own output.

A weight is defined once, on the error of x_0 or of the noise, and carried to the parameterisation by the gains of
`prediction`, so that every weighting fits every parameterisation and nothing is 0/0 at an end of the schedule.
`before` is (alpha, sigma) one step closer to the data; only the variational bound needs it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from ldm.diffusion.prediction import Prediction

Pair = tuple[Tensor, Tensor]


@runtime_checkable
class Weighting(Protocol):
    def weight(self, alpha: Tensor, sigma: Tensor, prediction: Prediction, before: Pair | None = None) -> Tensor: ...


def _snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    return alpha**2 / (sigma**2).clamp(min=1e-30)


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """1 for the network's own target: DDPM's simple loss (eq. 14) if that is the noise."""

    kind: Literal["uniform"] = "uniform"

    def weight(self, alpha: Tensor, sigma: Tensor, prediction: Prediction, before: Pair | None = None) -> Tensor:
        return torch.ones_like(alpha)


@dataclass(frozen=True, kw_only=True)
class MinSNR:
    """min(SNR, gamma) on the error of x_0 (arXiv 2303.09556)."""

    kind: Literal["min_snr"] = "min_snr"
    gamma: float = 5.0
    """The cap of the signal-to-noise ratio, above 0."""

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"gamma must be above 0, got {self.gamma}")

    def weight(self, alpha: Tensor, sigma: Tensor, prediction: Prediction, before: Pair | None = None) -> Tensor:
        return torch.minimum(prediction.noise_gain(alpha, sigma), self.gamma * prediction.x0_gain(alpha, sigma))


@dataclass(frozen=True, kw_only=True)
class SoftMinSNR:
    """gamma SNR / (SNR + gamma) on the error of x_0, a min-SNR without a corner (arXiv 2401.11605).

    On the error of the noise it is sigmoid(log gamma - log SNR), the sigmoid weight with its bias log gamma (arXiv
    2303.00848) at times drawn evenly in log SNR.
    """

    kind: Literal["soft_min_snr"] = "soft_min_snr"
    gamma: float = 4.0
    """The signal-to-noise ratio at which the weight has fallen to half of the plain one's, above 0."""

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"gamma must be above 0, got {self.gamma}")

    def weight(self, alpha: Tensor, sigma: Tensor, prediction: Prediction, before: Pair | None = None) -> Tensor:
        return prediction.noise_gain(alpha, sigma) * self.gamma / (_snr(alpha, sigma) + self.gamma)


@dataclass(frozen=True, kw_only=True)
class Debiased:
    """1 / sqrt(SNR) on the error of the noise, that is sqrt(SNR) on that of x_0 (arXiv 2310.08442)."""

    kind: Literal["debiased"] = "debiased"

    def weight(self, alpha: Tensor, sigma: Tensor, prediction: Prediction, before: Pair | None = None) -> Tensor:
        return (prediction.noise_gain(alpha, sigma) * prediction.x0_gain(alpha, sigma)).sqrt()


@dataclass(frozen=True, kw_only=True)
class SNR:
    """SNR on the error of x_0, that is 1 on the error of the noise, never below `floor` on x_0 (0: no floor).

    floor 1 is the truncated SNR of progressive distillation (arXiv 2202.00512).
    """

    kind: Literal["snr"] = "snr"
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not self.floor >= 0:
            raise ValueError(f"floor must be at least 0, got {self.floor}")

    def weight(self, alpha: Tensor, sigma: Tensor, prediction: Prediction, before: Pair | None = None) -> Tensor:
        weight = prediction.noise_gain(alpha, sigma)
        return torch.maximum(weight, self.floor * prediction.x0_gain(alpha, sigma)) if self.floor else weight


@dataclass(frozen=True, kw_only=True)
class P2:
    """1 / (k + SNR)^gamma on the error of the noise (arXiv 2204.00227, eq. 8)."""

    kind: Literal["p2"] = "p2"
    k: float = 1.0
    """Added to the signal-to-noise ratio, above 0."""
    gamma: float = 1.0
    """The power of the denominator, at least 0; 0 weighs all times alike."""

    def __post_init__(self) -> None:
        if not (self.k > 0 and self.gamma >= 0):
            raise ValueError(f"k must be above 0 and gamma at least 0, got {self.k} and {self.gamma}")

    def weight(self, alpha: Tensor, sigma: Tensor, prediction: Prediction, before: Pair | None = None) -> Tensor:
        return prediction.noise_gain(alpha, sigma) / (self.k + _snr(alpha, sigma)) ** self.gamma


Of = Literal["output", "x0"]


def _of(error: Of, alpha: Tensor, sigma: Tensor, prediction: Prediction) -> Tensor:
    """1 on the error of the output itself, or of x_0."""
    return torch.ones_like(alpha) if error == "output" else prediction.x0_gain(alpha, sigma)


def _check_of(error: str) -> None:
    if error not in ("output", "x0"):
        raise ValueError(f"of must be 'output' or 'x0', got {error!r}")


@dataclass(frozen=True, kw_only=True)
class X0:
    """1 on the error of x_0, whatever the network predicts.

    For a velocity the weight is sigma^2: the loss between -sigma v + x_t and x_0 (`precondition_outputs` of diffusers'
    SD3 training).
    """

    kind: Literal["x0"] = "x0"

    def weight(self, alpha: Tensor, sigma: Tensor, prediction: Prediction, before: Pair | None = None) -> Tensor:
        return prediction.x0_gain(alpha, sigma)


@dataclass(frozen=True, kw_only=True)
class SigmaSqrt:
    """1 / sigma^2, as diffusers' `sigma_sqrt`, on the error of the output or `of` x_0 (SD3: `precondition_outputs` 1).

    Of a flow's x_0 it is the plain loss of the velocity. On the output sigma counts as at least 0.001, the first of
    diffusers' table.
    """

    kind: Literal["sigma_sqrt"] = "sigma_sqrt"
    of: Of = "output"

    def __post_init__(self) -> None:
        _check_of(self.of)

    def weight(self, alpha: Tensor, sigma: Tensor, prediction: Prediction, before: Pair | None = None) -> Tensor:
        sigma = sigma.clamp(min=1e-3 if self.of == "output" else 1e-12)
        return _of(self.of, alpha, sigma, prediction) / sigma**2


@dataclass(frozen=True, kw_only=True)
class CosMapWeight:
    """2 / (pi (1 - 2 sigma + 2 sigma^2)), `CosMap`'s density as a weight, on the output or `of` x_0 (diffusers)."""

    kind: Literal["cosmap"] = "cosmap"
    of: Of = "output"

    def __post_init__(self) -> None:
        _check_of(self.of)

    def weight(self, alpha: Tensor, sigma: Tensor, prediction: Prediction, before: Pair | None = None) -> Tensor:
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)) * _of(self.of, alpha, sigma, prediction)


@dataclass(frozen=True, kw_only=True)
class VLB:
    """The weight of L_{t-1} in the bound: beta^2 / (2 var alpha_t (1 - alpha_bar)) on the noise (DDPM, eq. 12).

    `variance`: "small" (beta_tilde) or "large" (beta). The first step, whose beta_tilde is 0, takes beta: its own
    term is the decoder's, see `likelihood`. Sums over t and over dimensions to the bound; `Process.loss` means them.
    """

    kind: Literal["vlb"] = "vlb"
    variance: Literal["small", "large"] = "small"

    def __post_init__(self) -> None:
        if self.variance not in ("small", "large"):
            raise ValueError(f"variance must be 'small' or 'large', got {self.variance!r}")

    def weight(self, alpha: Tensor, sigma: Tensor, prediction: Prediction, before: Pair | None = None) -> Tensor:
        if before is None:
            raise ValueError("weighting vlb needs the step before: alpha and sigma one time closer to the data")
        alpha, sigma = alpha.double(), sigma.double()
        alpha_before, sigma_before = before[0].double(), before[1].double()
        step = alpha / alpha_before
        beta = sigma**2 - (step * sigma_before) ** 2
        small = beta * sigma_before**2 / sigma**2
        variance = torch.where(small > 0, small, beta) if self.variance == "small" else beta
        # In the error of x_0 the factor alpha cancels, which keeps the end with alpha = 0 finite.
        on_x0 = (alpha_before * beta) ** 2 / (2 * variance * sigma**4)
        gain = prediction.x0_gain(alpha, sigma)
        on_noise = beta**2 / (2 * variance * step**2 * sigma**2) * prediction.noise_gain(alpha, sigma)
        return torch.where(torch.isfinite(gain), on_x0 * gain, on_noise)
