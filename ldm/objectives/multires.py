"""Multi-resolution (pyramid) noise: noises of smaller pictures, enlarged, on top of the usual one.

wandb.ai/johnowhitaker/multires_noise; the figures are sd-scripts' `multires_noise_iterations` and `_discount`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ldm.rng import Rng, generator


def pyramid_noise(noise: Tensor, rng: Rng, iterations: int, discount: float) -> Tensor:
    """Noise (B, C, h, w) -> with noise of coarser grids, each sample scaled back to unit standard deviation.

    Level i adds discount^i times normal noise of h / r^i x w / r^i values, enlarged bilinearly; r is drawn in [2, 4)
    anew for each level and sample. It ends at a side of one value.
    """
    factors = [2 + 2 * rng.uniform(f"multires {i} factor") for i in range(iterations)]
    rows = []
    for row, position in enumerate(rng.positions):
        total = noise[row : row + 1].float()
        channels, height, width = noise.shape[1:]
        for i, factor in enumerate(factors):
            r = float(factor[row]) ** i
            size = max(1, int(height / r)), max(1, int(width / r))
            own = torch.randn(1, channels, *size, generator=generator(rng.seed, position, f"multires {i}"))
            coarse = own.to(total)
            total = total + discount**i * interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
            if 1 in size:
                break
        rows.append(total / total.std())
    return torch.cat(rows).to(noise.dtype)
