"""Which denoising networks there are, by the `kind` of their settings."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ldm.models.network import Network
from ldm.models.transformers.flux import FluxConfig, FluxTransformer
from ldm.models.transformers.pixart import PixArtConfig, PixArtTransformer
from ldm.models.transformers.sd3 import SD3Config, SD3Transformer
from ldm.models.transformers.zimage import ZImageConfig, ZImageTransformer
from ldm.models.unet import UNet, UNetConfig

AnyNetwork = UNetConfig | SD3Config | FluxConfig | PixArtConfig | ZImageConfig
"""The choice of a network in a config: a union of settings, told apart by `kind`."""
NETWORKS: dict[type[AnyNetwork], type[Network]] = {
    UNetConfig: UNet,
    SD3Config: SD3Transformer,
    FluxConfig: FluxTransformer,
    PixArtConfig: PixArtTransformer,
    ZImageConfig: ZImageTransformer,
}


def diffusers_keys(config: AnyNetwork) -> dict[str, Any]:
    """The settings under the keys of diffusers' `config.json`."""
    return {field.name: getattr(config, field.name) for field in fields(config) if field.name != "kind"}


def build(config: AnyNetwork) -> Network:
    """The network of some settings, with random weights."""
    return NETWORKS[type(config)](config)
