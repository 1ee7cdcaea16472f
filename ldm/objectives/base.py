"""The seam between a loss and the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ldm.rng import Rng
from ldm.types import Batch, Metrics

Whole = Callable[[], Iterator[tuple[str, Tensor]]]
"""Gives the whole trained weights by name, float32, as they are after the last step; collective."""


class Objective(nn.Module, ABC):
    """A loss over a micro-batch; what is registered enters the engine: `trained`, and what learns beside it alone."""

    trained: nn.Module

    def __init__(self, trained: nn.Module) -> None:
        super().__init__()
        self.trained = trained
        self._whole: Whole | None = None

    @abstractmethod
    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """The loss to minimise (a float32 scalar, mean over the micro-batch) and what to log."""

    def after_step(self, step: int) -> None:
        """Called with the number of optimizer steps done, after each and once before the first."""

    def bind(self, whole: Whole) -> None:
        """Told once, before the first step, how to read weights that ZeRO 3 has divided over the ranks."""
        self._whole = whole

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """The whole trained weights by their names below `trained`; collective where they are divided."""
        pairs = self.named_parameters() if self._whole is None else self._whole()
        for name, value in pairs:
            yield name.removeprefix("trained."), value.detach()

    def state(self) -> dict[str, Any]:
        """What resuming needs beyond the trained weights: JSON values and tensors."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo `state`."""

    @property
    def device(self) -> torch.device:
        """Where the trained weights are."""
        return next(self.trained.parameters()).device


def by_noise(losses: Tensor, level: Tensor, name: str = "loss") -> Metrics:
    """The mean of values (B,) in thirds of the time range, `level` in [0, 1].

    A third without samples repeats the overall mean.
    """
    metrics = {}
    for i, third in enumerate(("low", "middle", "high")):
        inside = ((level * 3).clamp(max=2.999).long() == i).float()
        count = inside.sum()
        mean = (losses * inside).sum() / count.clamp(min=1)
        metrics[f"{name}_{third}_noise"] = torch.where(count > 0, mean, losses.mean())
    return metrics
