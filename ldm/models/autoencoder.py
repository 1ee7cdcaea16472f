"""Where scripts of version 0.1 look for `ldm.models.vae`; to be removed with version 0.3."""

from __future__ import annotations

from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig

__all__ = ["Autoencoder", "AutoencoderConfig"]
