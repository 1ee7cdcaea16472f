"""The U-Net of Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

from ldm.models.unet.config import UNetConfig
from ldm.models.unet.unet import UNet

__all__ = ["UNet", "UNetConfig"]
