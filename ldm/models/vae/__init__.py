"""The autoencoder and its latents."""

from __future__ import annotations

from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.vae.latents import LatentCodec

__all__ = ["Autoencoder", "AutoencoderConfig", "LatentCodec"]
