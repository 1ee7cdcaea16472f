"""The seam between a loss and the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ldm.rng import Rng
from ldm.types import Batch, Metrics


class Objective(nn.Module, ABC):
    """A loss over a micro-batch; `trained` is the one registered child, so that only it enters the engine."""

    trained: nn.Module

    def __init__(self, trained: nn.Module) -> None:
        super().__init__()
        self.trained = trained

    @abstractmethod
    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """The loss to minimise (a float32 scalar, mean over the micro-batch) and what to log."""

    def after_step(self, step: int) -> None:
        """Called with the number of optimizer steps done, after each and once before the first."""

    def state(self) -> dict[str, Any]:
        """What resuming needs beyond the trained weights: JSON values and tensors."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo `state`."""

    @property
    def device(self) -> torch.device:
        """Where the trained weights are."""
        return next(self.trained.parameters()).device
