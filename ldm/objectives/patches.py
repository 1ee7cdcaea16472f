"""A small classifier of noised latents for the adversarial term of distribution matching."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu


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
        x = silu(self.first(torch.cat([x, level], dim=1)))
        x = silu(self.norm(self.down(x)))
        x = silu(self.norm_out(self.last(x)))
        return self.out(x).mean((1, 2, 3))
