"""What the error of a latent value costs: its square, its size, or a square that becomes a line (pseudo-Huber)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.prediction import broadcast
from ldm.diffusion.schedule import Discrete, Flow


@dataclass(frozen=True, kw_only=True)
class Squared:
    """d^2."""

    kind: Literal["mse"] = "mse"

    def cost(self, difference: Tensor, t: Tensor, schedule: Discrete | Flow) -> Tensor:
        """Of differences (B, ...) at times (B,), shaped as they are."""
        return difference**2


@dataclass(frozen=True, kw_only=True)
class Absolute:
    """|d|."""

    kind: Literal["l1"] = "l1"

    def cost(self, difference: Tensor, t: Tensor, schedule: Discrete | Flow) -> Tensor:
        """Of differences (B, ...) at times (B,), shaped as they are."""
        return difference.abs()


@dataclass(frozen=True, kw_only=True)
class _PseudoHuber:
    """As sd-scripts has it: a square below the threshold d, a line above; abstract.

    `schedule` of the threshold: "constant" is scale c; "exponential" falls from `scale` without noise to scale c at T,
    as scale c^(t / T); "snr" is (1 - c) / (1 + sigma / alpha)^2 + c. A flow's are the same of its times.
    """

    schedule: Literal["constant", "exponential", "snr"] = "snr"
    c: float = 0.1
    """The threshold's factor, in (0, 1]."""
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.c) and 0 < self.c <= 1):
            raise ValueError(f"c must be in (0, 1], got {self.c}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be above 0, got {self.scale}")
        if self.schedule == "snr" and self.scale != 1:
            raise ValueError(f"scale: {self.scale} is of schedule 'constant' and 'exponential', got 'snr'; write 1")

    def threshold(self, t: Tensor, schedule: Discrete | Flow) -> Tensor:
        """d of times (B,), float32."""
        if self.schedule == "constant":
            return torch.full(t.shape, self.c * self.scale, dtype=torch.float32, device=t.device)
        if self.schedule == "exponential":
            return (self.scale * self.c ** (t.double() / schedule.steps)).float()
        alpha, sigma = schedule.alpha_sigma(t, torch.float64, check=False)
        return ((1 - self.c) * (alpha / (alpha + sigma)) ** 2 + self.c).float()

    def _root(self, difference: Tensor, t: Tensor, schedule: Discrete | Flow) -> tuple[Tensor, Tensor]:
        """(d, sqrt(x^2 + d^2) - d)."""
        d = broadcast(self.threshold(t, schedule), difference)
        return d, torch.sqrt(difference**2 + d**2) - d


@dataclass(frozen=True, kw_only=True)
class Huber(_PseudoHuber):
    """2 d (sqrt(x^2 + d^2) - d): about x^2 of small errors, about 2 d |x| of large ones."""

    kind: Literal["huber"] = "huber"

    def cost(self, difference: Tensor, t: Tensor, schedule: Discrete | Flow) -> Tensor:
        """Of differences (B, ...) at times (B,), shaped as they are."""
        d, root = self._root(difference, t, schedule)
        return 2 * d * root


@dataclass(frozen=True, kw_only=True)
class SmoothL1(_PseudoHuber):
    """2 (sqrt(x^2 + d^2) - d): about x^2 / d of small errors, about 2 |x| of large ones."""

    kind: Literal["smooth_l1"] = "smooth_l1"

    def cost(self, difference: Tensor, t: Tensor, schedule: Discrete | Flow) -> Tensor:
        """Of differences (B, ...) at times (B,), shaped as they are."""
        return 2 * self._root(difference, t, schedule)[1]


Shape = Squared | Absolute | Huber | SmoothL1
