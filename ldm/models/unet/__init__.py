"""The U-Net of Stable Diffusion 1, 2 and XL, and the ControlNets that copy its encoder."""

from __future__ import annotations

from ldm.models.unet.config import UNetConfig
from ldm.models.unet.controlnet import ControlNet, ControlNetConfig
from ldm.models.unet.unet import UNet

__all__ = ["ControlNet", "ControlNetConfig", "UNet", "UNetConfig"]
