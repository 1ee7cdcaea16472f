"""The learning rate's course after its warm-up: a share of the peak for each optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Decay = Literal["constant", "cosine", "linear", "cosine_restarts", "polynomial", "rex", "inverse_sqrt", "wsd"]
TIMESCALE = 10_000
"""Of `inverse_sqrt` without a warm-up."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What the courses beside constant, cosine and linear take, each of its own.

    `cycles`: of cosine_restarts, which begins anew so often. `power`: of polynomial, final + (1 - final) (1 - u)^power.
    `timescale`: of inverse_sqrt, in steps; the rate falls as sqrt(timescale / (step - warmup + timescale)); 0: the
    warm-up's length, 10000 without one. `cooldown`: the last steps of wsd (warm-up, stable, decay), in which the rate
    falls to `final` as `shape` says: half a cosine, a line, or 1 - sqrt(u).
    """

    cycles: int = 1
    power: float = 1.0
    timescale: int = 0
    cooldown: int = 0
    shape: Literal["cosine", "linear", "sqrt"] = "cosine"

    def __post_init__(self) -> None:
        if self.cycles < 1:
            raise ValueError(f"cycles must be at least 1, got {self.cycles}")
        if not (math.isfinite(self.power) and self.power > 0):
            raise ValueError(f"power must be above 0, got {self.power}")
        for name in ("timescale", "cooldown"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0 steps, got {getattr(self, name)}")

    def check(self, decay: Decay) -> None:
        """Raise ValueError for what the chosen course does not take."""
        owners = {"cycles": "cosine_restarts", "power": "polynomial", "timescale": "inverse_sqrt", "cooldown": "wsd",
                  "shape": "wsd"}  # fmt: skip
        for name, owner in owners.items():
            if getattr(self, name) != getattr(Course, name) and decay != owner:
                raise ValueError(f"course.{name}: {getattr(self, name)} is of decay {owner!r}, got {decay!r}")
        if decay == "wsd" and not self.cooldown:
            raise ValueError("course.cooldown: decay 'wsd' needs the number of steps in which the rate falls, got 0")

    def share(self, decay: Decay, step: int, steps: int, warmup: int, final: float) -> float:
        """Of the peak rate at optimizer step `step` (from 0), at least `warmup`, of a run of `steps`."""
        u = min(1.0, (step - warmup) / max(1, steps - warmup))
        if decay == "constant":
            return 1.0
        if decay == "linear":
            return 1 - (1 - final) * u
        if decay == "inverse_sqrt":
            scale = self.timescale or warmup or TIMESCALE
            return max(final, math.sqrt(scale / (step - warmup + scale)))
        return final + (1 - final) * self._falling(decay, u, step, steps)

    def _falling(self, decay: Decay, u: float, step: int, steps: int) -> float:
        """From 1 to 0 for u from 0 to 1."""
        if decay == "cosine_restarts":
            return 0.0 if u >= 1 else 0.5 * (1 + math.cos(math.pi * (self.cycles * u % 1)))
        if decay == "polynomial":
            return (1 - u) ** self.power
        if decay == "rex":
            return (1 - u) / (1 - u / 2)
        if decay == "wsd":
            return self._cooled(min(1.0, max(0.0, (step - steps + self.cooldown) / self.cooldown)))
        return 0.5 * (1 + math.cos(math.pi * u))

    def _cooled(self, u: float) -> float:
        if self.shape == "cosine":
            return 0.5 * (1 + math.cos(math.pi * u))
        return 1 - u if self.shape == "linear" else 1 - math.sqrt(u)
