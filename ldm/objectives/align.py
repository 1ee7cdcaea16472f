"""Representation alignment (REPA; Yu et al. 2024, arXiv 2410.06940): features inside of the network that denoises are
drawn towards those that a frozen network has of the clean picture.

Legend: B batch, C target's features, F network's features, N places, h, w places along the sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm.models.network import Network, Tap, tapped
from ldm.types import Batch

FEATURES = "features"
"""The batch's key of the target's features (B, C, h, w), which caches hold."""
NAME = "alignment"
"""What the projector's weights are called by in checkpoints, before their own names."""

Encode = Callable[[Tensor], Tensor]
"""Pictures (B, 3, H, W) in [-1, 1] -> features (B, C, h, w)."""


@dataclass(frozen=True, kw_only=True)
class AlignOptions:
    """`target`: whose features: "efficientnet_lite0", or a CLIP as evaluation takes them ("clip_emoji").

    `weight`: of 1 - the mean cosine similarity beside the loss. `layer`: whose features are drawn: a block's number
    (transformers), "down_blocks.I", "mid_block" or "up_blocks.I" (U-Nets); null is the block after a third of them, or
    the middle. `hidden`: width of the projector's two inner layers. `size`: the side to which pictures are resized for
    the target, null: as they are. `until`: the optimizer step from which it is off (HASTE, arXiv 2505.16792).
    """

    target: str = "efficientnet_lite0"
    weight: float = 0.5
    layer: int | str | None = None
    hidden: int = 2048
    size: int | None = None
    until: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight must be above 0, got {self.weight}")
        for name in ("hidden", "size", "until"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


class Alignment(nn.Module):
    """The projector, which trains beside the network and is no part of it, and the loss.

    `channels` are the target's; `encode` gives its features where the batch has pictures and no features.
    Raises ValueError for a layer that the network has not.
    """

    def __init__(self, network: Network, options: AlignOptions, channels: int, encode: Encode | None = None) -> None:
        super().__init__()
        self.options = options
        self.place, width = chosen_place(network, options.layer)
        self._network, self._encode = (network,), encode  # in a tuple: not registered
        hidden = options.hidden
        self.projector = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, channels)
        )
        self._width = width

    def on(self, step: int) -> bool:
        """Whether the step after `step` optimizer steps aligns."""
        return self.options.until is None or step < self.options.until

    @contextmanager
    def watching(self, step: int) -> Iterator[Tap | None]:
        """Inside, the network's `forward` leaves what is aligned in the tap; None where nothing is."""
        if not (self.on(step) and torch.is_grad_enabled()):
            yield None
            return
        with tapped(self._network[0], self.place) as tap:
            yield tap

    def forward(self, tap: Tap | None, batch: Batch, size: tuple[int, int]) -> Tensor | None:
        """The mean similarity (B,) over places, in [-1, 1]; `size` is that of the latents. None where it is off."""
        if tap is None:
            return None
        assert tap.value is not None
        features, grid = tap.value, tuple(side // self._network[0].multiple for side in size)
        if features.ndim == 4:
            grid, features = tuple(features.shape[2:]), features.flatten(2).mT
        if features.shape[1] != math.prod(grid):
            raise ValueError(f"options.align.layer: block {self.place} sees only the tokens that are not led around it")
        projected = self.projector(features)
        wanted = self._wanted(batch, projected.device)
        if tuple(wanted.shape[2:]) != grid:
            wanted = functional.interpolate(wanted, size=grid, mode="bilinear", antialias=True, align_corners=False)
        return functional.cosine_similarity(projected.float(), wanted.flatten(2).mT, dim=-1).mean(1)

    def nothing(self) -> Tensor:
        """0, whose gradients are zeros: every stage of ZeRO wants one of every weight."""
        like = next(self.parameters())
        return 0.0 * self.projector(torch.zeros(1, self._width, device=like.device, dtype=like.dtype)).float().sum()

    @torch.no_grad()
    def _wanted(self, batch: Batch, device: torch.device) -> Tensor:
        if FEATURES in batch:
            return batch[FEATURES].to(device, non_blocking=True).float()
        if self._encode is None or "image" not in batch:
            raise ValueError(f"options.align: the batch has neither pictures nor cached {FEATURES} of them")
        return self._encode(batch["image"].to(device, non_blocking=True)).float()


def chosen_place(network: Network, layer: int | str | None) -> tuple[str, int]:
    """A layer's place and how many features it has. Raises ValueError naming those that there are."""
    places = network.places()
    place = network.usual_place if layer is None else str(layer)
    if place not in places:
        allowed = list(places) if len(places) < 12 else f"0 to {len(places) - 1}"
        raise ValueError(f"options.align.layer: {layer!r} is not a layer of the {network.title}; allowed: {allowed}")
    return place, places[place]


def without_projector(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's weights without the projector's: what is exported."""
    return {name: value for name, value in weights.items() if not name.startswith(f"{NAME}.")}
