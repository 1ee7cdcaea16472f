"""Exponential moving averages on the float32 master shards: no full copy, right under every ZeRO stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """`decay` at full speed; warm-up min(decay, (1 + n) / (10 + n)) after n updates. 0 is off."""

    decay: float = 0.999
    warmup: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")


class Ema:
    """The averaged shards of one rank."""

    def __init__(self, config: EmaConfig, masters: list[Tensor]) -> None:
        self.config = config
        self.shards = [m.detach().clone() for m in masters]

    def decay_at(self, step: int) -> float:
        """Decay of the update after optimizer step number `step` (from 1)."""
        n = step - 1
        return min(self.config.decay, (1 + n) / (10 + n)) if self.config.warmup else self.config.decay

    @torch.no_grad()
    def update(self, masters: list[Tensor], step: int) -> None:
        """Move towards the masters; `step` counts from 1."""
        torch._foreach_lerp_(self.shards, [m.detach() for m in masters], 1.0 - self.decay_at(step))
