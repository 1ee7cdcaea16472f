"""A patch discriminator (Isola et al. 2017) with group norm in place of batch norm, and a head on a U-Net's middle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """`channels` of the strided convolutions, each halving the picture."""

    channels: tuple[int, ...] = (32, 64, 128)


class Discriminator(nn.Module):
    """Images (B, 3, H, W) -> logits of patches (B, 1, h, w); higher is more real."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        last = 3
        for i, width in enumerate(config.channels):
            layers.append(nn.Conv2d(last, width, 4, stride=2, padding=1))
            if i:
                layers.append(nn.GroupNorm(8, width))
            layers.append(nn.LeakyReLU(0.2))
            last = width
        layers.append(nn.Conv2d(last, 1, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 1, H / 2**levels, W / 2**levels)."""
        return self.layers(images)


class MiddleHead(nn.Module):
    """A U-Net's middle features (B, C, h, w) -> logits (B,), higher is more real (arXiv 2405.14867, 4.3)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.out = nn.Linear(channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B,)."""
        x = nn.functional.silu(self.conv(nn.functional.silu(self.norm(features))))
        return self.out(x.mean((2, 3)))[:, 0]


class PatchHead(nn.Module):
    """Noised latents (B, Z, h, w) and their sigma (B,) -> logits (B,), the mean over patches; higher is more real.

    A few convolutions of their own, as in patch discriminators (Isola et al. 2017), told the level of the noise
    (Wang et al. 2022, arXiv 2206.02262): a small part of the cost of half a U-Net, and blind to the prompt.
    """

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels + 1, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)
        self.norm = nn.GroupNorm(8, 2 * width)
        self.last = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.norm_out = nn.GroupNorm(8, 2 * width)
        self.out = nn.Conv2d(2 * width, 1, 3, padding=1)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Logits (B,)."""
        level = sigma.to(x).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        x = nn.functional.silu(self.first(torch.cat([x, level], dim=1)))
        x = nn.functional.silu(self.norm(self.down(x)))
        x = nn.functional.silu(self.norm_out(self.last(x)))
        return self.out(x).mean((1, 2, 3))
