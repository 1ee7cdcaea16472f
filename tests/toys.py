"""Distillation's toys: a Gaussian world where every optimum is in closed form, and networks of a line.

The data are N(0, SPREAD^2), and the networks scale their input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.diffusion.prediction import Sample
from ldm.diffusion.process import Process
from ldm.diffusion.schedule import Discrete
from ldm.objectives.base import Objective
from ldm.objectives.teacher import Estimator, Teacher
from ldm.rng import Rng, generator
from ldm.types import Batch, Cond

SPREAD = 0.6
SCHEDULE = Discrete(betas="linear", steps=100, beta_start=1e-3, beta_end=0.1)
PROCESS = Process(schedule=SCHEDULE, prediction=Sample())


def gain(t: Tensor, spread: float = SPREAD) -> Tensor:
    """E[x_0 | x_t] / x_t of data N(0, spread^2), float64."""
    alpha, sigma = SCHEDULE.alpha_sigma(t, torch.float64)
    return alpha * spread**2 / ((alpha * spread) ** 2 + sigma**2)


def exact(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The posterior mean."""
    return (gain(t).to(x) if x.dtype == torch.float64 else gain(t).float()).view(-1, 1, 1, 1) * x


class Linear(nn.Module):
    """x_0 = (a gain of its own for each time) x."""

    def __init__(self, gains: Tensor) -> None:
        super().__init__()
        self.gains = nn.Parameter(gains.clone())

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.gains[t.long()].view(-1, 1, 1, 1) * x


@dataclass(frozen=True)
class Together(Rng):
    """One generator for the whole batch: quicker, where no batch is ever divided."""

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        return torch.randn(len(self), *shape, generator=generator(self.seed, self.positions[0], purpose))

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        return torch.rand(len(self), *shape, generator=generator(self.seed, self.positions[0], purpose))


class Normals:
    """Feeds draws of the data."""

    empty: Cond = {}

    def latents(self, batch: Batch, rng: Rng, device: torch.device) -> Tensor:
        return SPREAD * rng.normal("data", (1, 1, 1)).double()

    def cond(self, batch: Batch, rng: Rng, device: torch.device) -> Cond:
        return {}


TEACHER = Teacher(Estimator(exact, PROCESS), None)


def batch(count: int, first: int = 0) -> tuple[Batch, Rng]:
    return {"weight": torch.ones(count)}, Rng(5, tuple(range(first, first + count)))


def step(objective: Objective, gains: Tensor, count: int = 200) -> tuple[float, float]:
    """The loss of a batch, and its largest slope by the gains."""
    loss, _ = objective(*batch(count))
    loss.backward()
    assert gains.grad is not None
    return loss.item(), float(gains.grad.abs().max())


def ddim(x: Tensor, times: list[int], end: tuple[float, float]) -> Tensor:
    """The exact teacher's DDIM path over integer times, then to a last level (alpha, sigma); written out, float64."""
    levels = [*map(SCHEDULE.at, map(float, times)), end]
    for t, (a, s), (b, r) in zip(times, levels, levels[1:], strict=False):
        x0 = gain(torch.tensor(t)) * x
        x = b * x0 + r * (x - a * x0) / s
    return x


class Probe(nn.Module):
    """Answers a fixed function of all that it is given."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        told = cond.get("guidance", torch.zeros(len(x))).view(-1, 1, 1, 1)
        return self.scale * x + 1e-3 * t.view(-1, 1, 1, 1) + cond["text"].mean((1, 2)).view(-1, 1, 1, 1) + 0.1 * told


class Latents:
    """Feeds random latents and text."""

    empty: Cond = {"text": torch.full((1, 2, 3), 0.25)}

    def latents(self, batch: Batch, rng: Rng, device: torch.device) -> Tensor:
        return rng.normal("latents", (2, 3, 3))

    def cond(self, batch: Batch, rng: Rng, device: torch.device) -> Cond:
        return {"text": rng.normal("text", (2, 3))}
