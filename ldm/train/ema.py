"""Exponential moving averages on the float32 master shards: no full copy, right under every ZeRO stage.

Several at once: the main one with a fixed decay, others of other decays, and power-function averages (Karras et al.
2023, arXiv 2312.02696, section 3.1) whose snapshots `ldm.train.posthoc` combines into one of any width afterwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WIDEST = 12**-0.5
"""The relative width of the plain mean over a whole run (gamma 0)."""


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """`decay` at full speed; warm-up min(decay, (1 + n) / (10 + n)) after n updates. 0 is off.

    `others`: more decays, each with an average of its own. `power`: relative widths sigma_rel of power-function
    averages, such as [0.05, 0.1]; a snapshot of them is kept in the run's `ema` folder every `snapshot` steps (0: with
    every checkpoint), in half precision if `half_snapshots`.
    """

    decay: float = 0.999
    warmup: bool = True
    """Whether the decay grows with the updates, min(decay, (1 + n) / (10 + n))."""
    others: tuple[float, ...] = ()
    power: tuple[float, ...] = ()
    snapshot: int = 0
    half_snapshots: bool = False

    def __post_init__(self) -> None:
        for name, value in (("decay", self.decay), *(("others", v) for v in self.others)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        for width in self.power:
            if not 0 < width < WIDEST:
                raise ValueError(f"power: a relative width must be in (0, {WIDEST:.4f}), got {width}")
        if len({self.decay, *self.others}) != 1 + len(self.others):
            raise ValueError(f"others: {list(self.others)} must differ from each other and from decay {self.decay}")
        if len(set(self.power)) != len(self.power):
            raise ValueError(f"power: {list(self.power)} must differ from each other")
        if self.snapshot < 0:
            raise ValueError(f"snapshot must be at least 0 steps (0: with every checkpoint), got {self.snapshot}")


def gamma_of(width: float) -> float:
    """The exponent of a relative width: the gamma with (gamma+1) / ((gamma+2)^2 (gamma+3)) = width^2."""
    t = width**-2
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())


def width_of(gamma: float) -> float:
    """The relative width of an exponent: sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3))."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def decay_name(decay: float) -> str:
    """The kind, in a checkpoint, of an average of another decay than the main one."""
    return f"ema.decay.{decay!r}"


def power_name(width: float) -> str:
    """The kind, in a checkpoint, of a power-function average."""
    return f"ema.power.{width!r}"


class Ema:
    """The averaged shards of one rank, by kind: `ema` is the main one."""

    def __init__(self, config: EmaConfig, masters: list[Tensor]) -> None:
        self.config = config
        kinds = ["ema", *map(decay_name, config.others), *map(power_name, config.power)]
        self.averages = {kind: [m.detach().clone() for m in masters] for kind in kinds}
        self._gammas = {power_name(w): gamma_of(w) for w in config.power}
        self._decays = {"ema": config.decay, **{decay_name(d): d for d in config.others}}

    @property
    def shards(self) -> list[Tensor]:
        """The main average, laid out like the masters."""
        return self.averages["ema"]

    @property
    def powers(self) -> dict[str, list[Tensor]]:
        """The power-function averages by kind."""
        return {kind: self.averages[kind] for kind in self._gammas}

    def decay_at(self, step: int, kind: str = "ema") -> float:
        """Decay of the update after optimizer step `step` (from 1); a power function's is (1 - 1/t)^(gamma+1)."""
        if kind in self._gammas:
            return (1.0 - 1.0 / step) ** (self._gammas[kind] + 1.0)
        n, decay = step - 1, self._decays[kind]
        return min(decay, (1 + n) / (10 + n)) if self.config.warmup else decay

    @torch.no_grad()
    def update(self, masters: list[Tensor], step: int) -> None:
        """Move towards the masters; `step` counts from 1."""
        plain = [m.detach() for m in masters]
        for kind, shards in self.averages.items():
            torch._foreach_lerp_(shards, plain, 1.0 - self.decay_at(step, kind))
