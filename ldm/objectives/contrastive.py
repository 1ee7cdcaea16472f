"""Contrastive image-text training with open_clip's loss (Radford et al. 2021)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import dist
from ldm.objectives.base import Objective
from ldm.rng import Rng
from ldm.types import Batch, Metrics


class ContrastiveObjective(Objective):
    """Matches each picture with its caption among the global batch; needs "image" (B, 3, H, W) and "tokens" (B, T).

    Pictures arrive in [-1, 1], which is what the towers here are trained on.
    """

    def __init__(self, clip: nn.Module, augment: float = 0.0) -> None:
        from open_clip.loss import ClipLoss

        super().__init__(clip)
        self._augment = augment
        self._loss: Any = ClipLoss(
            local_loss=dist.world_size() > 1,
            gather_with_grad=dist.world_size() > 1,
            rank=dist.rank(),
            world_size=dist.world_size(),
        )

    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Symmetric cross-entropy, and the share of pictures that find their caption in the micro-batch."""
        clip: Any = self.trained
        images = augment(batch["image"], rng, self._augment).to(self.device)
        image, text, scale = clip(images, batch["tokens"].to(self.device))[:3]
        image, text = image.float(), text.float()
        scale = scale.clamp(max=100)  # the paper's bound; in the graph, so that it holds under every ZeRO stage
        with nullcontext() if image.is_meta else torch.autocast(self.device.type, enabled=False):
            loss = self._loss(image, text, scale.float())
            hits = _found(image.detach() @ text.detach().T)
        return loss, {"accuracy": hits.detach(), "scale": scale.detach().float().mean()}


def _found(cosines: Tensor) -> Tensor:
    """Share of rows whose own column is highest; of those that are so together within rounding, a part of one."""
    own, apart = cosines.diagonal()[:, None], 16 * torch.finfo(torch.float32).eps
    above, level = (cosines > own + apart).sum(1), ((cosines - own).abs() <= apart).sum(1)
    return (((above == 0) & (level > 0)) / level.clamp(min=1)).mean()  # NaN is level with nothing


def augment(images: Tensor, rng: Rng, strength: float) -> Tensor:
    """Zoom by 1 +- strength and shift by up to strength / 2 of the side, per picture; the edge is repeated outside."""
    if strength == 0:
        return images
    u = 2 * rng.uniform("augment", (3,)) - 1
    zoom, shift = 1 + strength * u[:, 0], strength * u[:, 1:]
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False).to(images.device)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
