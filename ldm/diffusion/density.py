"""Which training times are drawn: uniform, logit-normal and others of flows, or by the size of recent losses.

Each gives u = t / T in [0, 1), before the schedule's own shift: a flow with shift s draws s u / (1 + (s - 1) u).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.schedule import DynamicShift


@dataclass(frozen=True, kw_only=True)
class UniformTimes:
    """Every time equally often."""

    kind: Literal["uniform"] = "uniform"

    def warp(self, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """logit(t / T) ~ N(mean, std^2): more of the middle (arXiv 2403.03206, section 3.1).

    As in the paper a mean above 0 is towards the noise. diffusers' and sd-scripts' training counts u from the noise:
    their `logit_mean` has the other sign.
    """

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    """The mean of logit(t / T), above 0 towards the noise."""
    std: float = 1.0
    """The standard deviation of logit(t / T), above 0."""

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std must be above 0, got {self.std}")

    def warp(self, u: Tensor) -> Tensor:
        """Uniform u (B,) -> logit-normal u (B,), by the inverse distribution function."""
        normal = torch.special.ndtri(u.double().clamp(1e-12, 1 - 1e-12))
        return torch.sigmoid(self.mean + self.std * normal).clamp(max=1 - 1e-7).to(u.dtype)


@dataclass(frozen=True, kw_only=True)
class Mode:
    """Heavy in the middle without the tails' vanishing: t / T = 1 - v - scale (cos^2(pi v / 2) - 1 + v), v uniform.

    arXiv 2403.03206, eq. 20; scale in [-1, 2 / (pi - 2)], 0 is uniform, below 0 more of both ends.
    """

    kind: Literal["mode"] = "mode"
    scale: float = 1.29
    """How much of the middle, in [-1, 2 / (pi - 2)]; 0 is uniform."""

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(f"scale must lie in [-1, {2 / (math.pi - 2):.4f}], got {self.scale}")

    def warp(self, u: Tensor) -> Tensor:
        """Uniform u (B,) -> the published curve at v = 1 - u, so that it increases."""
        v = 1 - u.double()
        return _below_one(1 - v - self.scale * (torch.cos(math.pi / 2 * v) ** 2 - 1 + v), u)


@dataclass(frozen=True, kw_only=True)
class CosMap:
    """The flow's times at which a cosine schedule's log-SNR is drawn evenly: t / T = 1 - 1 / (tan(pi u / 2) + 1).

    Its density is 2 / (pi - 2 pi t + 2 pi t^2) (arXiv 2403.03206, eq. 21). diffusers' `cosmap` draws evenly and
    weights by it: weighting "cosmap".
    """

    kind: Literal["cosmap"] = "cosmap"

    def warp(self, u: Tensor) -> Tensor:
        angle = math.pi / 2 * u.double()
        return _below_one(torch.sin(angle) / (torch.sin(angle) + torch.cos(angle)), u)


@dataclass(frozen=True, kw_only=True)
class ShiftedUniform:
    """t / T = s u / (1 + (s - 1) u): uniform times moved to more noise by `shift` s (arXiv 2403.03206, eq. 23).

    A schedule's own shift comes on top: the two multiply.
    """

    kind: Literal["shifted_uniform"] = "shifted_uniform"
    shift: float = 3.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"shift must be above 0, got {self.shift}")

    def warp(self, u: Tensor) -> Tensor:
        wide = u.double()
        return _below_one(self.shift * wide / (1 + (self.shift - 1) * wide), u)


@dataclass(frozen=True, kw_only=True)
class FluxShift:
    """Logit-normal or uniform times with the shift of a picture's number of tokens: sd-scripts' `flux_shift`.

    `std` is its `sigmoid_scale`, of "logit_normal" alone. For FLUX.1 the shift e^mu makes logit(t / T) ~ N(mu, std^2).
    """

    kind: Literal["flux_shift"] = "flux_shift"
    base: Literal["logit_normal", "uniform"] = "logit_normal"
    """The density that is shifted."""
    std: float = 1.0
    dynamic: DynamicShift = field(default_factory=DynamicShift)

    def __post_init__(self) -> None:
        if self.base not in ("logit_normal", "uniform"):
            raise ValueError(f"base must be 'logit_normal' or 'uniform', got {self.base!r}")
        if not self.std > 0:
            raise ValueError(f"std must be above 0, got {self.std}")

    def of_tokens(self, tokens: int) -> LogitNormal | ShiftedUniform:
        """The density for pictures of so many image tokens, after 2 x 2 packing."""
        shift = self.dynamic.shift(tokens)
        if self.base == "uniform":
            return ShiftedUniform(shift=shift)
        return LogitNormal(mean=math.log(shift), std=self.std)


def _below_one(values: Tensor, like: Tensor) -> Tensor:
    """Clamped to [0, 1), in the type of `like`."""
    return values.clamp(0, 1 - 1e-7).to(like.dtype)


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Times in proportion to the root mean square of their last `history` losses; see `ImportanceTimes`.

    Every time keeps at least `floor` of its even share.
    """

    kind: Literal["importance"] = "importance"
    history: int = 10
    floor: float = 0.001

    def __post_init__(self) -> None:
        if self.history < 1 or not 0 <= self.floor < 1:
            raise ValueError(f"history must be at least 1 and floor in [0, 1), got {self.history} and {self.floor}")


class ImportanceTimes:
    """Times drawn in proportion to the root mean square of their recent losses (improved DDPM, eq. 18).

    Uniform until every time has `history` losses. The weights undo the bias: their mean over draws is 1. State is
    plain tensors for the checkpoint; feed it the losses of all ranks so that they stay equal.
    """

    def __init__(self, steps: int, history: int = 10, floor: float = 0.001) -> None:
        if steps < 1 or history < 1 or not 0 <= floor < 1:
            raise ValueError(
                f"steps and history must be at least 1 and floor in [0, 1), got {steps}, {history} and {floor}"
            )
        self.floor = floor
        self.losses = torch.zeros(steps, history, dtype=torch.float64)
        self.counts = torch.zeros(steps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """(T,) float64, summing to 1; at least floor / T each."""
        steps, history = self.losses.shape
        if bool((self.counts < history).any()):
            return torch.full((steps,), 1 / steps, dtype=torch.float64)
        size = (self.losses**2).mean(1).sqrt()
        total = size.sum()
        share = size / total if float(total) > 0 else torch.full_like(size, 1 / steps)
        return (1 - self.floor) * share + self.floor / steps

    def sample(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Uniform u (B,) -> (times (B,) int64, loss weights (B,) float32)."""
        p = self.probabilities()
        edges = p.cumsum(0)
        t = torch.searchsorted(edges / edges[-1], u.double().cpu(), right=True).clamp(max=len(p) - 1)
        return t.to(u.device), (1 / (len(p) * p[t])).float().to(u.device)

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Remember the unweighted losses (B,) of times (B,)."""
        for time, value in zip(t.tolist(), loss.detach().double().tolist()):
            row = self.losses[time]
            row.copy_(torch.cat([row[1:], row.new_tensor([value])]))
            self.counts[time] += 1

    def state(self) -> dict[str, Tensor]:
        return {"losses": self.losses.clone(), "counts": self.counts.clone()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.losses.copy_(state["losses"])
        self.counts.copy_(state["counts"])
