"""A stand-in for a pipeline."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.pipeline import Settings


class Fake:
    """Draws a picture that tells its number."""

    def __init__(self) -> None:
        self.drawn: list[int] = []

    def sample(self, prompts: list[str], *, settings: Settings, indices: list[int]) -> Tensor:
        self.drawn += indices
        return torch.stack([torch.full((3, 4, 4), i / 10 - 1) for i in indices])
