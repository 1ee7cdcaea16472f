"""Masked loss: which places of a picture are learned, by a picture beside it or its transparency."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ldm.types import Batch

LOSS_WEIGHT = "loss_weight"
"""The pair whose brightness is the weight of a picture's places in the loss."""


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """The loss by the mask's mean m over each latent pixel: its weight is m + (1 - m) `outside`.

    `outside` 0: what is outside is not learned. `normalize` divides by the mean weight of the picture, so that one
    with a small mask counts as much as others (OneTrainer's normalize_masked_area_loss, and ai-toolkit's way); without,
    the mean is over all latent pixels, as sd-scripts has it. `pair`: which of `data.pairs` is the mask.
    """

    outside: float = 0.0
    normalize: bool = False
    pair: str = LOSS_WEIGHT

    def __post_init__(self) -> None:
        if not (math.isfinite(self.outside) and 0 <= self.outside <= 1):
            raise ValueError(f"outside must be in [0, 1], got {self.outside}")

    def region(self, batch: Batch, latents: Tensor) -> Tensor:
        """The weights (B, 1, h, w) of latent pixels. Raises ValueError for a batch without the mask."""
        if self.pair not in batch:
            raise ValueError(
                f"the batch has no {self.pair!r}, which options.mask needs; data.pairs reads it: {self.pair}: "
                "{kind: stored, channels: 1} (docs/finetuning.md)"
            )
        mask = batch[self.pair].to(latents.device, non_blocking=True).float()[:, :1]
        inside = adaptive_avg_pool2d(mask, (latents.shape[2], latents.shape[3]))
        return inside + (1 - inside) * self.outside
