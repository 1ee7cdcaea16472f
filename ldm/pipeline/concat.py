"""What networks that see a picture beside their latents are told of it.

Legend: B pictures of a batch, Z latent channels, H, W pixels, h, w latent pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.augmentation import NoiseAugmentation
from ldm.models.concat import Kind, kind_of
from ldm.models.network import Network
from ldm.models.vae.latents import LatentCodec
from ldm.pipeline.memory import Placement
from ldm.types import Cond

_VERBS = {"mask": "inpaint", "fill": "inpaint", "source": "instruct", "small": "upscale"}
_TOLD = {
    "mask": "a picture and a mask", "fill": "a picture and a mask", "source": "the picture before an edit",
    "small": "a small picture",
}  # fmt: skip


def painter(network: Network, codec: LatentCodec) -> Kind | None:
    """How a network is told of a picture by more channels, None for one that is not told."""
    return kind_of(network.config, network.in_channels, codec.channels, codec.factor)


def filling(mask: Tensor, rest: Tensor, factor: int) -> Tensor:
    """The latents (B, Z, h, w) of the rest of the picture, and under each of them its pixels of the mask (B or 1, 1, H,
    W): (B, Z + factor^2, h, w)."""
    below = F.pixel_unshuffle(mask.to(rest), factor).expand(len(rest), -1, -1, -1)
    return torch.cat([rest, below], dim=1)


@dataclass(frozen=True)
class Concat:
    """The parts of a pipeline that make of pictures what is concatenated to the latents."""

    network: Network
    codec: LatentCodec
    place: Placement
    augmentation: NoiseAugmentation | None = None

    @property
    def kind(self) -> Kind | None:
        """What the network is told beside its latents."""
        return painter(self.network, self.codec)

    def check(self, cond: Cond, *, wrapped: bool) -> None:
        """Raise ValueError where a picture is missing that the network is told of; a `wrapped` denoiser may tell it."""
        if not wrapped and "concat" not in cond and self.kind is not None:
            raise ValueError(
                f"the {self.network.title} is told {_TOLD[self.kind]} here: use `ldm edit {_VERBS[self.kind]}`"
            )

    def inpainting(self, images: Tensor, mask: Tensor) -> Cond:
        """Of pictures (B, 3, H, W) in [-1, 1] and a mask (B or 1, 1, H, W), 1 where to draw.

        Beside the mask it is the picture's latents with grey in the mask's place. Raises ValueError for a network that
        is not told of one.
        """
        kind, z, takes = self.kind, self.codec.channels, self.network.in_channels
        if kind not in ("mask", "fill"):
            raise ValueError(f"inpainting: needs a {self.network.title} with {2 * z + 1} channels, got {takes}")
        mask = (mask >= 0.5).to(images)
        with self.place.used(self.codec.autoencoder):
            known = self.codec.encode((images * (1 - mask)).to(self.place.device_of(self.network)))
        if kind == "fill":
            return {"concat": filling(mask, known, self.codec.factor)}
        return {
            "concat": torch.cat(
                [small_mask(mask, self.codec.factor).to(known).expand(len(known), -1, -1, -1), known], 1
            )
        }

    def original(self, images: Tensor) -> Cond:
        """Of pictures (B, 3, H, W) in [-1, 1] before an edit: their latents, not scaled, of the posterior's mode.

        Raises ValueError for a network that is not told of them.
        """
        if self.kind != "source":
            z, title, takes = self.codec.channels, self.network.title, self.network.in_channels
            raise ValueError(f"editing by an instruction: needs a {title} with {2 * z} channels, got {takes}")
        with self.place.used(self.codec.autoencoder):
            moments = self.codec.moments(images.to(self.place.device_of(self.network)))
        return {"concat": moments.chunk(2, dim=1)[0]}

    def check_level(self, level: int) -> None:
        """Raise ValueError for a network that is told no small picture, and for a level that it is not told."""
        if self.kind != "small":
            z, title, takes = self.codec.channels, self.network.title, self.network.in_channels
            raise ValueError(
                f"super-resolution: needs a {title} with {z + 3} channels and classes for levels of noise, got {takes} "
                "channels"
            )
        most = (self.augmentation or NoiseAugmentation()).levels
        if not 0 <= level < most:
            raise ValueError(f"level of the noise on the small picture: must be in [0, {most - 1}], got {level}")

    def small(self, images: Tensor, level: int, noise: Tensor) -> Cond:
        """Of small pictures (B, 3, h, w) in [-1, 1], a pixel for each of the latents', with noise of a level.

        Raises ValueError as `check_level` does.
        """
        self.check_level(level)
        levels = torch.full((len(images),), level)
        shown = (self.augmentation or NoiseAugmentation()).add(images, noise.to(images), levels)
        return {"concat": shown, "class": levels}


def small_mask(mask: Tensor, factor: int) -> Tensor:
    """A mask (B, 1, H, W) at latent pixels by nearest, as diffusers and the published models have it."""
    return mask[..., ::factor, ::factor]
