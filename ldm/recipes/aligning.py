"""The frozen networks that training is aligned to, as caches name them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ldm.metrics.features import EfficientNetLite0
from ldm.models.network import Network
from ldm.models.text import openclip
from ldm.objectives.align import FEATURES, Alignment, AlignOptions, chosen_place
from ldm.recipes.sources import load_clip, weights_hash

EFFICIENTNET = "efficientnet_lite0"
_CHANNELS = 112


@dataclass(frozen=True)
class AlignTarget:
    """A frozen network: `encode` makes features (B, `channels`, h, w) of pictures; `told` names it with its weights."""

    encode: Callable[[Tensor], Tensor]
    channels: int
    told: str

    @property
    def hashes(self) -> dict[str, str]:
        """What a cache with its features must have been made with."""
        return {FEATURES: self.told}


def align_target(options: AlignOptions, device: torch.device | str) -> AlignTarget:
    """The target of the options. Raises ValueError where there is none of this name, or it has no maps."""
    return named_target(options.target, options.size, device, "task.options.align.target")


def named_target(name: str, size: int | None, device: torch.device | str, key: str) -> AlignTarget:
    """The target of a name, which sees pictures at a side of `size`, or as they are."""
    if name == EFFICIENTNET:
        network = EfficientNetLite0(device=device)
        encode: Callable[[Tensor], Tensor] = lambda x: network.perceptual_features(x)[-1]  # noqa: E731
        return _target(name, encode, _CHANNELS, weights_hash(network.network), size)
    clip, config = load_clip(name)
    if size is not None and size != config.image_size:
        raise ValueError(f"{key}: {name!r} sees pictures at {config.image_size} pixels, not at size {size}; write null")
    visual: Any = clip.model.visual if isinstance(clip, openclip.OpenClip) else clip.visual
    if not callable(vars(type(visual)).get("forward_intermediates")):
        raise ValueError(f"{key}: {name!r} gives no features of places; use 'clip_emoji' or {EFFICIENTNET!r}")
    visual = visual.to(device)

    def encode_clip(images: Tensor) -> Tensor:
        images = openclip.fitted(images, config)
        if isinstance(clip, openclip.OpenClip):
            images = ((images + 1) / 2 - clip.mean.to(images)) / clip.std.to(images)
        found = visual.forward_intermediates(images, indices=1, normalize_intermediates=True, intermediates_only=True)
        return found["image_intermediates"][-1]

    with torch.no_grad():
        channels = encode_clip(torch.zeros(1, 3, config.image_size, config.image_size, device=device)).shape[1]
    return _target(name, encode_clip, channels, weights_hash(visual), None)


def _target(
    name: str, encode: Callable[[Tensor], Tensor], channels: int, weights: str, size: int | None
) -> AlignTarget:
    @torch.no_grad()
    def maps(images: Tensor) -> Tensor:
        images = images.float()
        if size is not None and tuple(images.shape[2:]) != (size, size):
            images = functional.interpolate(
                images, size=(size, size), mode="bilinear", antialias=True, align_corners=False
            )
        with torch.autocast(images.device.type, enabled=False):
            return encode(images).float()

    digest = hashlib.blake2b(f"{weights} {size}".encode(), digest_size=8).hexdigest()
    return AlignTarget(maps, channels, f"{name.rstrip('/').rsplit('/', 1)[-1]}:{digest}")


def aligned(
    options: AlignOptions | None, network: Network, device: torch.device, cached: bool
) -> tuple[Alignment | None, AlignTarget | None]:
    """The projector with its loss, and the target, which runs in every step unless its features are `cached`."""
    if options is None:
        return None, None
    target = align_target(options, device)
    return Alignment(network, options, target.channels, None if cached else target.encode), target


def plan_lines(options: AlignOptions | None, network: Network, cached: bool) -> list[str]:
    """What a plan says of alignment, which it does not count."""
    if options is None:
        return []
    place, width = chosen_place(network, options.layer)
    where = "read from the cache" if cached else f"and {options.target}, which runs for each picture of each step"
    return [
        f"task.options.align: not counted: the projector from {place} ({width} -> {options.hidden} -> {options.hidden} "
        f"-> the target's features), {where}"
    ]
