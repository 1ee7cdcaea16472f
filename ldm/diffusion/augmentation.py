"""Conditioning augmentation: noise on a small picture, of a level that the network is told (Ho et al. 2022, arXiv
2106.15282, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ldm.diffusion.prediction import broadcast
from ldm.diffusion.schedule import Discrete


@dataclass(frozen=True, kw_only=True)
class NoiseAugmentation:
    """Levels 0 .. `levels` - 1 are times of `schedule`; the usual ones are those of Stable Diffusion's x4 upscaler."""

    schedule: Discrete = field(default_factory=lambda: Discrete(beta_start=0.0001, beta_end=0.02))
    levels: int = 350

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= self.schedule.steps:
            raise ValueError(f"levels must be in [1, {self.schedule.steps}], the schedule's steps, got {self.levels}")

    def draw(self, u: Tensor) -> Tensor:
        """Uniform u (B,) in [0, 1) -> levels (B,), int64."""
        return (u.double() * self.levels).long()

    def add(self, pictures: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Pictures (B, C, h, w) with noise of their levels (B,)."""
        alpha, sigma = (broadcast(v, pictures) for v in self.schedule.alpha_sigma(level))
        return (alpha * pictures + sigma * noise).to(pictures.dtype)
