"""Whether a denoising network takes what text towers and an autoencoder give."""

from __future__ import annotations

from ldm.models.networks import AnyNetwork
from ldm.models.presets import TEXTS
from ldm.models.text import TextConfig


def width(configs: tuple[TextConfig, ...]) -> int:
    """Of the towers' states side by side."""
    return sum(c.width for c in configs)


def pooled_width(configs: tuple[TextConfig, ...]) -> int:
    """Of the last tower's pooled vector."""
    return configs[-1].projection or configs[-1].width


def check_fit(
    network: AnyNetwork, text: tuple[TextConfig, ...], channels: int, *, text_key: str, vae_key: str, network_key: str
) -> None:
    """Raise ValueError, naming keys and values, where the network cannot take what the other parts give."""
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
    if network.in_channels != channels:
        raise ValueError(
            f"{network_key}.in_channels: {network.in_channels}, but {vae_key} has latents of {channels} channels"
        )
