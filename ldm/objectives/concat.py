"""Pictures that a U-Net is told by more channels while it trains: what of a batch they are made of.

Legend: B samples, Z latent channels, H, W pixels, h, w latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ldm.diffusion.augmentation import NoiseAugmentation
from ldm.models.concat import Kind
from ldm.models.vae.latents import LatentCodec
from ldm.rng import Rng
from ldm.types import Batch, Cond

MASK = "inpaint_mask"
"""The pair that is 1 where a picture is to be painted."""
ORIGINAL = "original"
"""The pair that is the picture before an edit."""
SMALL = "small"
"""The pair that is the picture shrunk."""


@dataclass(frozen=True)
class Drop:
    """Shares of samples that are dropped: `text` of those whose caption alone is; `part` of all shares holds now."""

    text: float
    part: float = 1.0

    def between(self, rng: Rng, low: float, high: float) -> Tensor:
        """The rows (B,) whose draw is in [low, high); captions are dropped by the same one, below a share."""
        u = rng.uniform("drop")
        return (u >= self.part * low) & (u < self.part * high)


@dataclass(frozen=True, kw_only=True)
class Inpaint:
    """The mask at latent pixels and latents of the picture without what is under it (Stable Diffusion's inpainting).

    `outside`: the weight that latent pixels without a masked pixel have in the loss, 1 as all others (as published), 0
    none: a mean by these weights for each sample.
    """

    kind: Literal["inpaint"] = "inpaint"
    outside: float = 1.0

    told: ClassVar[Kind] = "mask"
    pairs: ClassVar[Mapping[str, str]] = {MASK: "{kind: random_mask}", "masked": "{kind: masked}"}
    """The pairs of a batch that it takes, and how a config may make them."""
    both: ClassVar[float] = 0.0
    """Share of samples whose text is dropped by it."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.outside) and 0 <= self.outside <= 1):
            raise ValueError(f"outside must be in [0, 1], got {self.outside}")

    def example(self, rows: int, pixels: int, codec: LatentCodec) -> Batch:
        """What a batch of square pictures has of it, without memory, as a cache gives it."""
        side, z = pixels // codec.factor, codec.channels
        shapes = {MASK: (rows, 1, pixels, pixels), "masked.moments": (rows, 2 * z, side, side)}
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    def cond(self, batch: Batch, rng: Rng, codec: LatentCodec, device: torch.device, drop: Drop) -> Cond:
        """ "concat" (B, 1 + Z, h, w); the masked picture's latents are a draw from the posterior."""
        check_batch(self.pairs, batch)
        moments = moments_of("masked", batch, codec, device)
        noise = rng.normal("posterior masked", (moments.shape[1] // 2, *moments.shape[2:]))
        known = codec.sample(moments, noise.to(moments))
        mask = batch[MASK].to(device, non_blocking=True).to(known)
        return {"concat": torch.cat([mask[..., :: codec.factor, :: codec.factor], known], dim=1)}

    def region(self, batch: Batch, codec: LatentCodec) -> Tensor | None:
        """The weights (B, 1, h, w) of latent pixels in the loss; None where all are alike."""
        if self.outside == 1:
            return None
        inside = functional.max_pool2d(batch[MASK].float(), codec.factor)
        return inside + (1 - inside) * self.outside


@dataclass(frozen=True, kw_only=True)
class Instruct:
    """The latents of the picture before an edit, not scaled, of the posterior's mode (arXiv 2211.09800).

    The caption is the instruction. `drop`: share of samples whose picture becomes zeros, `both`: whose caption becomes
    the empty prompt too; `options.drop` is the share of those whose caption alone does.
    """

    kind: Literal["instruct"] = "instruct"
    drop: float = 0.05
    both: float = 0.05

    told: ClassVar[Kind] = "source"
    pairs: ClassVar[Mapping[str, str]] = {ORIGINAL: "{kind: stored, cache: latents}"}

    def __post_init__(self) -> None:
        for name in ("drop", "both"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    def example(self, rows: int, pixels: int, codec: LatentCodec) -> Batch:
        """What a batch of square pictures has of it, without memory, as a cache gives it."""
        side = pixels // codec.factor
        return {f"{ORIGINAL}.moments": torch.empty(rows, 2 * codec.channels, side, side, device="meta")}

    def cond(self, batch: Batch, rng: Rng, codec: LatentCodec, device: torch.device, drop: Drop) -> Cond:
        """ "concat" (B, Z, h, w)."""
        check_batch(self.pairs, batch)
        mode = moments_of(ORIGINAL, batch, codec, device).chunk(2, dim=1)[0]
        gone = drop.between(rng, drop.text, drop.text + self.both + self.drop)
        return {"concat": torch.where(gone.to(device).view(-1, 1, 1, 1), torch.zeros_like(mode), mode)}

    def region(self, batch: Batch, codec: LatentCodec) -> None:
        """All latent pixels are alike in the loss."""


@dataclass(frozen=True, kw_only=True)
class Upscale:
    """A small picture, a pixel for each of the latents', with noise whose level is told (Stable Diffusion x4 upscaler).

    The network is told the level as a class, so it has `num_class_embeds`.
    """

    kind: Literal["upscale"] = "upscale"
    noise: NoiseAugmentation = field(default_factory=NoiseAugmentation)

    told: ClassVar[Kind] = "small"
    pairs: ClassVar[Mapping[str, str]] = {SMALL: "{kind: small, factor: 4}"}
    both: ClassVar[float] = 0.0

    def example(self, rows: int, pixels: int, codec: LatentCodec) -> Batch:
        """What a batch of square pictures has of it, without memory, as a cache gives it."""
        side = pixels // codec.factor
        return {SMALL: torch.empty(rows, 3, side, side, device="meta")}

    def cond(self, batch: Batch, rng: Rng, codec: LatentCodec, device: torch.device, drop: Drop) -> Cond:
        """ "concat" (B, 3, h, w) and "class" (B,)."""
        check_batch(self.pairs, batch)
        small = 2 * batch[SMALL].to(device, non_blocking=True) - 1
        noise, level = rng.normal("low resolution", small.shape[1:]), self.noise.draw(rng.uniform("noise level"))
        return {"concat": self.noise.add(small, noise.to(small), level.to(small.device)), "class": level.to(device)}

    def region(self, batch: Batch, codec: LatentCodec) -> None:
        """All latent pixels are alike in the loss."""


Concat = Inpaint | Instruct | Upscale


def check_batch(pairs: Mapping[str, str], batch: Batch) -> None:
    """Raise ValueError for a batch that lacks one of the pairs."""
    for name in pairs:
        if name not in batch and f"{name}.moments" not in batch:
            raise ValueError(f"the batch has no {name!r}; data.pairs makes or reads one: {name}: {pairs[name]}")


def moments_of(name: str, batch: Batch, codec: LatentCodec, device: torch.device) -> Tensor:
    """The posterior's moments (B, 2 Z, h, w) of a pair: cached, or of its pixels."""
    if f"{name}.moments" in batch:
        return batch[f"{name}.moments"].to(device, non_blocking=True).float()
    return codec.moments(2 * batch[name].to(device, non_blocking=True) - 1).float()
