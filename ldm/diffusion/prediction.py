"""What the network predicts: noise, v, x_0 or the flow's velocity; each converts into every other.

With x = alpha x_0 + sigma noise: v = alpha noise - sigma x_0 (arXiv 2202.00512), velocity = noise - x_0 (arXiv
2209.03003). alpha and sigma come as (B,) or already broadcast to the rank of x. v and velocity are defined at both ends
of every schedule; noise says nothing of x_0 where alpha is 0, nor x_0 of noise where sigma is 0: there the missing
part is returned as 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Prediction(Protocol):
    """One parameterisation of the network's output."""

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...

    def x0(self, out: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...

    def noise(self, out: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...

    def x0_gain(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Squared error of x_0 for one unit of squared error of the output, at fixed x."""
        ...

    def noise_gain(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Squared error of the noise for one unit of squared error of the output: SNR times `x0_gain`."""
        ...


def broadcast(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) with the rank of `like`; other ranks pass."""
    return values.view(-1, *[1] * (like.dim() - 1)) if values.dim() == 1 and like.dim() > 1 else values


def _divide(top: Tensor, bottom: Tensor) -> Tensor:
    """top / bottom, 0 where bottom is 0."""
    empty = bottom == 0
    return torch.where(empty, torch.zeros_like(top), top / torch.where(empty, torch.ones_like(bottom), bottom))


@dataclass(frozen=True, kw_only=True)
class Epsilon:
    """The noise (DDPM, eq. 14)."""

    kind: Literal["epsilon"] = "epsilon"

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise

    def x0(self, out: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        alpha, sigma = broadcast(alpha, x), broadcast(sigma, x)
        return _divide(x - sigma * out, alpha)

    def noise(self, out: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return out

    def x0_gain(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma**2 / alpha**2

    def noise_gain(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(alpha)


@dataclass(frozen=True, kw_only=True)
class V:
    """v = alpha noise - sigma x_0 (progressive distillation, arXiv 2202.00512, appendix D)."""

    kind: Literal["v"] = "v"

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        alpha, sigma = broadcast(alpha, x0), broadcast(sigma, x0)
        return alpha * noise - sigma * x0

    def x0(self, out: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        alpha, sigma = broadcast(alpha, x), broadcast(sigma, x)
        return (alpha * x - sigma * out) / (alpha**2 + sigma**2)

    def noise(self, out: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        alpha, sigma = broadcast(alpha, x), broadcast(sigma, x)
        return (sigma * x + alpha * out) / (alpha**2 + sigma**2)

    def x0_gain(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (sigma / (alpha**2 + sigma**2)) ** 2

    def noise_gain(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha / (alpha**2 + sigma**2)) ** 2


@dataclass(frozen=True, kw_only=True)
class Sample:
    """x_0 itself."""

    kind: Literal["sample"] = "sample"

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x0

    def x0(self, out: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return out

    def noise(self, out: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        alpha, sigma = broadcast(alpha, x), broadcast(sigma, x)
        return _divide(x - alpha * out, sigma)

    def x0_gain(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(alpha)

    def noise_gain(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha**2 / sigma**2


@dataclass(frozen=True, kw_only=True)
class Velocity:
    """noise - x_0, the direction of a straight path from data to noise (arXiv 2209.03003)."""

    kind: Literal["velocity"] = "velocity"

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise - x0

    def x0(self, out: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        alpha, sigma = broadcast(alpha, x), broadcast(sigma, x)
        return (x - sigma * out) / (alpha + sigma)

    def noise(self, out: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        alpha, sigma = broadcast(alpha, x), broadcast(sigma, x)
        return (x + alpha * out) / (alpha + sigma)

    def x0_gain(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (sigma / (alpha + sigma)) ** 2

    def noise_gain(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha / (alpha + sigma)) ** 2


PREDICTIONS: dict[str, Epsilon | V | Sample | Velocity] = {p.kind: p for p in (Epsilon(), V(), Sample(), Velocity())}


def convert(out: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, source: Prediction, into: Prediction) -> Tensor:
    """The output of a network of one parameterisation as if it had another."""
    return into.target(source.x0(out, x, alpha, sigma), source.noise(out, x, alpha, sigma), alpha, sigma)
