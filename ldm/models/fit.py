"""Whether a denoising network takes what text encoders and an autoencoder give."""

from __future__ import annotations

import torch

from ldm.models import networks
from ldm.models.network import Network
from ldm.models.networks import AnyNetwork
from ldm.models.presets import TEXTS
from ldm.models.text import TextConfig
from ldm.models.unet import UNetConfig
from ldm.types import Cond


def width(configs: tuple[TextConfig, ...]) -> int:
    """Of the towers' states side by side."""
    return sum(c.width for c in configs)


def pooled_width(configs: tuple[TextConfig, ...]) -> int:
    """Of the last tower's pooled vector."""
    return configs[-1].projection or configs[-1].width


def given(configs: tuple[TextConfig, ...], batch: int = 1) -> Cond:
    """What text encoders give, without memory: the keys and shapes of `encode_texts`."""
    tokens = configs[0].max_length or configs[0].context_length
    shapes = {"text": (batch, tokens, width(configs)), "pooled": (batch, pooled_width(configs))}
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def sizes(network: Network, batch: int = 1) -> Cond:
    """What a network is told beside text, without memory."""
    shapes = {"time_ids": (batch, 6), "guidance": (batch,), "resolution": (batch, 2), "aspect_ratio": (batch,)}
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items() if key in network.needs}


def check_fit(
    network: AnyNetwork, text: tuple[TextConfig, ...], channels: int, *, text_key: str, vae_key: str, network_key: str
) -> None:
    """Raise ValueError, naming keys and values, where the network cannot take what the other parts give."""
    if isinstance(network, UNetConfig):
        _check_unet(network, text, text_key, network_key)
        takes = network.in_channels
    else:
        with torch.device("meta"):
            built = networks.build(network)
        takes = built.in_channels
        wanted = {*built.needs, "mask"}
        cond = {k: v for k, v in (given(text) | sizes(built)).items() if k.partition(".")[0] in wanted}
        try:
            built.prepared(cond)
        except ValueError as error:
            raise ValueError(f"{network_key}: does not fit {text_key}: {error}") from None
    if takes != channels:
        raise ValueError(f"{network_key}.in_channels: {takes}, but {vae_key} has latents of {channels} channels")


def _check_unet(network: UNetConfig, text: tuple[TextConfig, ...], text_key: str, network_key: str) -> None:
    states, vector = width(text), pooled_width(text)
    near = [n for n in ("sd15", "sd21", "sdxl") if {width(TEXTS[n])} == set(network.per_level("cross_attention_dim"))]
    hint = f"; those of {near[0]} would fit" if near else ""
    for given in network.per_level("cross_attention_dim"):
        if given != states:
            raise ValueError(
                f"{network_key}.cross_attention_dim: {given}, but {text_key} has text states of width {states}{hint}"
            )
    if network.addition_embed_type == "text_time":
        ids = 6 * (network.addition_time_embed_dim or 0)
        want = network.projection_class_embeddings_input_dim
        if vector + ids != want:
            raise ValueError(
                f"{network_key}.projection_class_embeddings_input_dim: {want}, but {text_key} has a pooled vector of "
                f"{vector} and the six sizes take {ids}: {vector + ids} in all{hint}"
            )
