"""Which denoising networks there are, by the `kind` of their settings."""

from __future__ import annotations

from ldm.models.network import Network
from ldm.models.unet import UNet, UNetConfig

AnyNetwork = UNetConfig
"""The choice of a network in a config: a union of settings, told apart by `kind`."""
NETWORKS: dict[type[AnyNetwork], type[Network]] = {UNetConfig: UNet}


def build(config: AnyNetwork) -> Network:
    """The network of some settings, with random weights."""
    return NETWORKS[type(config)](config)
