"""Contrastive image-text training with open_clip's loss (Radford et al. 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm import dist
from ldm.objectives.base import Objective
from ldm.rng import Rng
from ldm.types import Batch, Metrics


class ContrastiveObjective(Objective):
    """Matches each picture with its caption among the global batch; needs "image" (B, 3, H, W) and "tokens" (B, T).

    Pictures arrive in [-1, 1], which is what the towers here are trained on.
    """

    def __init__(self, clip: nn.Module) -> None:
        from open_clip.loss import ClipLoss

        super().__init__(clip)
        self._loss: Any = ClipLoss(
            local_loss=dist.world_size() > 1,
            gather_with_grad=dist.world_size() > 1,
            rank=dist.rank(),
            world_size=dist.world_size(),
        )

    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Symmetric cross-entropy, and the share of pictures that find their caption in the micro-batch."""
        clip: Any = self.trained
        image, text, scale = clip(batch["image"].to(self.device), batch["tokens"].to(self.device))[:3]
        image, text = image.float(), text.float()
        scale = scale.clamp(max=100)  # the paper's bound; in the graph, so that it holds under every ZeRO stage
        with torch.autocast(self.device.type, enabled=False):
            loss = self._loss(image, text, scale.float())
            hits = ((image @ text.T).argmax(1) == torch.arange(len(image), device=image.device)).float().mean()
        return loss, {"accuracy": hits.detach(), "scale": scale.detach().float()}
