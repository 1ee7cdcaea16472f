"""Pixels <-> latents: the one place with the scaling factor (names of the stages as in EDM2's encoders).

Legend: B batch, H, W pixels, h, w latent pixels, Z latent channels.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ldm.models.vae.autoencoder import Autoencoder
from ldm.models.vae.tiles import decode_tiled

log = logging.getLogger(__name__)


class LatentCodec:
    """Images -> unscaled moments -> scaled latents -> images; scaled = (z - shift) * scale."""

    def __init__(self, autoencoder: Autoencoder, scale: float, shift: float = 0.0) -> None:
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        self.autoencoder = autoencoder
        self.scale = float(scale)
        self.shift = float(shift)

    @staticmethod
    def of(autoencoder: Autoencoder) -> LatentCodec:
        """With the factors of the autoencoder's own config."""
        return LatentCodec(autoencoder, autoencoder.config.scaling_factor, autoencoder.config.shift_factor or 0.0)

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return self.autoencoder.factor

    def pixels(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(H, W) of the pictures whose latents have a shape (..., h, w)."""
        return shape[-2] * self.factor, shape[-1] * self.factor

    @property
    def channels(self) -> int:
        """Z."""
        return self.autoencoder.config.latent_channels

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> unscaled mean and logvar (B, 2Z, h, w), float32."""
        weight = self.autoencoder.encoder.conv_in.weight
        return self.autoencoder.encode(images.to(weight.device, weight.dtype))

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents (B, Z, h, w) from moments (B, 2Z, h, w): a draw with `noise`, the mode without."""
        mean, logvar = moments.chunk(2, dim=1)
        z = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        return (z - self.shift) * self.scale

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scaled latents (B, Z, h, w)."""
        return self.sample(self.moments(images), noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, Z, h, w) -> images (B, 3, H, W) in float32, not clipped; differentiable."""
        weight = self.autoencoder.decoder.conv_in.weight
        z = latents.to(weight.device, weight.dtype) / self.scale + self.shift
        images = self.autoencoder.decode(z)
        return images if images.dtype == torch.float64 else images.float()

    @torch.no_grad()
    def draw(self, latents: Tensor, *, tile: int | None = None, slices: bool = False) -> Tensor:
        """`decode` for looking at: one picture at a time with `slices`, in bands of `tile` x `tile` pixels.

        An autoencoder of half precision whose pictures are not finite (SDXL's in fp16) goes on in float32, and that is
        said in the log. Raises ValueError naming the pictures if they are not finite then either.
        """
        if slices and len(latents) > 1:
            return torch.cat([self.draw(z[None], tile=tile) for z in latents])
        images = self._draw(latents, tile)
        kind = self.autoencoder.decoder.conv_out.weight.dtype
        if kind in (torch.float16, torch.bfloat16) and not bool(torch.isfinite(images).all()):
            log.warning("the autoencoder's pictures are not finite in %s: it goes on in float32", kind)
            self.autoencoder.float()
            images = self._draw(latents, tile)
        bad = (~torch.isfinite(images)).flatten(1).any(1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"the autoencoder's pictures {bad} of this batch are not finite")
        return images

    def _draw(self, latents: Tensor, tile: int | None) -> Tensor:
        if tile is None:
            few = 16 if latents.device.type == "cpu" else max(len(latents), 1)  # a CPU's caches hold no more
            return torch.cat([self.decode(part) for part in latents.split(few)])
        weight = self.autoencoder.decoder.conv_in.weight
        z = latents.to(weight.device, weight.dtype) / self.scale + self.shift
        images = decode_tiled(self.autoencoder, z, tile)
        return images if images.dtype == torch.float64 else images.float()
