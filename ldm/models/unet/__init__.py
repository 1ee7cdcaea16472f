"""The U-Net of Stable Diffusion 1, 2 and XL, the ControlNets that copy its encoder, and IP-Adapters."""

from __future__ import annotations

from ldm.models.unet.config import UNetConfig
from ldm.models.unet.controlnet import ControlNet, ControlNetConfig
from ldm.models.unet.image_prompt import IPAdapter, IPAdapterConfig
from ldm.models.unet.unet import UNet

__all__ = ["ControlNet", "ControlNetConfig", "IPAdapter", "IPAdapterConfig", "UNet", "UNetConfig"]
