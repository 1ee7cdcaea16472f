"""Whether a denoising network takes what text encoders and an autoencoder give."""

from __future__ import annotations

import torch

from ldm.models import networks
from ldm.models.network import Network
from ldm.models.networks import AnyNetwork
from ldm.models.presets import TEXTS
from ldm.models.text.config import AnyText, MissingConfig, TextConfig
from ldm.models.unet import UNetConfig
from ldm.types import Cond


def width(configs: tuple[TextConfig, ...]) -> int:
    """Of the towers' states side by side."""
    return sum(c.width for c in configs)


def pooled_width(configs: tuple[TextConfig, ...]) -> int:
    """Of the last tower's pooled vector."""
    return configs[-1].projection or configs[-1].width


def tokens(config: AnyText) -> int:
    """How many tokens a text encoder gives at most."""
    if isinstance(config, TextConfig):
        return config.max_length or config.context_length
    return config.tokens if isinstance(config, MissingConfig) else config.max_length


def given(configs: tuple[AnyText, ...], batch: int = 1, *, device: str = "meta") -> Cond:
    """What text encoders give: zeros under the keys and in the shapes of `encode_texts`, by default without memory."""
    towers = tuple(c for c in configs if isinstance(c, TextConfig))
    shapes: dict[str, tuple[int, ...]] = {}
    if len(towers) == len(configs):
        shapes = {"text": (batch, tokens(towers[0]), width(towers)), "pooled": (batch, pooled_width(towers))}
    else:
        for i, config in enumerate(configs):
            end = f".{i}" if len(configs) > 1 else ""
            shapes[f"text{end}"] = (batch, tokens(config), config.width)
            if isinstance(config, TextConfig):
                shapes[f"pooled{end}"] = (batch, pooled_width((config,)))
            elif getattr(config, "masked", False):
                shapes[f"mask{end}"] = (batch, tokens(config))
    return {key: torch.zeros(shape, device=device) for key, shape in shapes.items()}


def told(network: Network, configs: tuple[AnyText, ...], batch: int = 1) -> Cond:
    """All that a network is told of prompts and sizes, without memory; without what it has no use for."""
    heads = {*network.needs, "mask"}
    found = {key: value for key, value in given(configs, batch).items() if key.partition(".")[0] in heads}
    return found | sizes(network, batch)


def sizes(network: Network, batch: int = 1) -> Cond:
    """What a network is told beside text, without memory."""
    shapes = {"time_ids": (batch, 6), "guidance": (batch,), "resolution": (batch, 2), "aspect_ratio": (batch,)}
    found = {key: torch.empty(shape, device="meta") for key, shape in shapes.items() if key in network.needs}
    if getattr(network.config, "num_class_embeds", None) is not None:
        found["class"] = torch.zeros(batch, dtype=torch.int64, device="meta")
    return found


def check_fit(
    network: AnyNetwork,
    text: tuple[AnyText, ...],
    channels: int,
    *,
    text_key: str,
    vae_key: str,
    network_key: str,
    more: int = 0,
) -> None:
    """Raise ValueError, naming keys and values, where the network cannot take what the other parts give.

    `more`: channels that are concatenated to the latents.
    """
    if isinstance(network, UNetConfig):
        towers = tuple(c for c in text if isinstance(c, TextConfig))
        if len(towers) != len(text):
            raise ValueError(f"{text_key}: holds other encoders than CLIP's towers, which alone a U-Net takes")
        _check_unet(network, towers, text_key, network_key)
        takes = network.in_channels
    else:
        with torch.device("meta"):
            built = networks.build(network)
        takes = built.in_channels
        try:
            built.prepared(told(built, text))
        except ValueError as error:
            raise ValueError(f"{network_key}: does not fit {text_key}: {error}") from None
    if takes != channels + more:
        beside = f", to which task.options.concat adds {more}" if more else ""
        raise ValueError(
            f"{network_key}.in_channels: {takes}, but {vae_key} has latents of {channels} channels{beside}"
        )


def _check_unet(network: UNetConfig, text: tuple[TextConfig, ...], text_key: str, network_key: str) -> None:
    states, vector = width(text), pooled_width(text)
    takes = set(network.per_level("cross_attention_dim"))
    near = [name for name in ("sd15", "sd21", "sdxl") if {sum(c.width for c in TEXTS[name])} == takes]
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
