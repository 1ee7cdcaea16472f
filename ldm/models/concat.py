"""Pictures that enter a U-Net by concatenation of channels: how many these are, and how a U-Net comes to take them.

Legend: Z channels of the latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.models.network import Network
from ldm.models.networks import AnyNetwork
from ldm.models.unet import UNetConfig
from ldm.models.unet.unet import UNet

Kind = Literal["mask", "fill", "source", "small"]
"""What a network is told beside the latents. "mask": one channel of latent pixels, then the latents of the picture
without what is under it (2 Z + 1 channels, Stable Diffusion's inpainting); "fill": such latents, then all of the mask's
pixels (2 Z + factor^2, FLUX.1 Fill); "source": latents of the picture before an edit (2 Z, InstructPix2Pix); "small": a
small picture as pixels, whose noise level is a class (Z + 3, Stable Diffusion's x4 upscaler)."""
LEVELS = 1000
"""Noise levels of a small picture that a fresh upscaler can be told."""


def kind_of(config: Any, takes: int, channels: int, factor: int) -> Kind | None:
    """What a network that takes so many channels is told beside latents of Z; None of one that is told nothing more."""
    if takes == channels + 3 and getattr(config, "num_class_embeds", None) is not None:
        return "small"
    told: dict[int, Kind] = {channels + factor**2: "fill", channels: "source", channels + 1: "mask"}
    return told.get(takes - channels)


def takes_pictures(config: AnyNetwork) -> bool:
    """Whether a network can be told a picture by more channels while it trains: U-Nets can."""
    return isinstance(config, UNetConfig)


def beside(kind: Kind, channels: int, factor: int) -> int:
    """How many channels that is."""
    return {"mask": channels + 1, "fill": channels + factor**2, "source": channels, "small": 3}[kind]


def wide_config(config: AnyNetwork, kind: Kind) -> AnyNetwork:
    """The settings of a U-Net of Z channels that is told of a picture too; those of any other network as they are."""
    if not isinstance(config, UNetConfig) or config.in_channels != config.out_channels or kind == "fill":
        return config
    classes = LEVELS if kind == "small" and _classless(config) else config.num_class_embeds
    more = beside(kind, config.out_channels, 1)
    return replace(config, in_channels=config.in_channels + more, num_class_embeds=classes)


def _classless(config: UNetConfig) -> bool:
    return config.class_embed_type is None and config.num_class_embeds is None


def widened(network: Network, config: AnyNetwork) -> Network:
    """A U-Net of the settings that `wide_config` gives for this one, which answers as this one does.

    What it is told more is multiplied by zeros, and so ignored, until it trains. The network itself where nothing is to
    be widened.
    """
    if config == network.config or not isinstance(network, UNet) or not isinstance(config, UNetConfig):
        return network
    with torch.device(next(network.parameters()).device):
        made = UNet(config)
    told, weights = made.state_dict(), network.state_dict()
    first = torch.zeros_like(told["conv_in.weight"])
    first[:, : network.in_channels] = weights["conv_in.weight"]
    weights["conv_in.weight"] = first
    if "class_embedding.weight" in told and "class_embedding.weight" not in weights:
        weights["class_embedding.weight"] = torch.zeros_like(told["class_embedding.weight"])
    made.load_state_dict(weights, strict=True)
    return made.train(network.training)


def config_of(config: AnyNetwork, weights: Mapping[str, Tensor]) -> AnyNetwork:
    """The settings of a U-Net with these weights, which may be those that `wide_config` gave for `config`."""
    if not isinstance(config, UNetConfig):
        return config
    labels = weights.get("class_embedding.weight") if config.class_embed_type is None else None
    classes = config.num_class_embeds if labels is None else labels.shape[0]
    return replace(config, in_channels=weights["conv_in.weight"].shape[1], num_class_embeds=classes)
