"""Which training times are drawn: uniform, logit-normal, or by the size of recent losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class UniformTimes:
    """Every time equally often."""

    kind: Literal["uniform"] = "uniform"

    def warp(self, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """logit(t / T) ~ N(mean, std^2): more of the middle (arXiv 2403.03206, section 3.1)."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std must be above 0, got {self.std}")

    def warp(self, u: Tensor) -> Tensor:
        """Uniform u (B,) -> logit-normal u (B,), by the inverse distribution function."""
        normal = torch.special.ndtri(u.double().clamp(1e-12, 1 - 1e-12))
        return torch.sigmoid(self.mean + self.std * normal).clamp(max=1 - 1e-7).to(u.dtype)


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
