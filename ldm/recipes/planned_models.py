"""Models of a plan without the memory of their weights: those that are here, and published families for those that are
not; and whether the parts of one fit each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint.settings import read_json
from ldm.config.load import decode
from ldm.diffusion.process import Process
from ldm.models import networks
from ldm.models.networks import AnyNetwork
from ldm.models.presets import AUTOENCODERS, PRESETS, TEXTS, usual_of_unet
from ldm.models.shipped import SHIPPED
from ldm.models.text import build_encoder
from ldm.models.text.base import TextEncoder
from ldm.models.text.config import AnyText
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.vae.latents import LatentCodec
from ldm.pipeline import TextToImage
from ldm.recipes.sources import load_towers, network_of

FAMILIES = {
    "sd15": ("sd15", "kl_f8", "sd15"),
    "sd15_pix2pix": ("sd15_pix2pix", "kl_f8", "sd15"),
    "x4_upscaler": ("x4_upscaler", "kl_f4_upscaler", "sd21"),
    "sd21": ("sd21", "kl_f8", "sd21"),
    "sd21_base": ("sd21_base", "kl_f8", "sd21"),
    "sdxl": ("sdxl", "kl_f8_sdxl", "sdxl"),
    "lcm_sd15": ("lcm_sd15", "kl_f8", "sd15"),
    "sd3": ("sd3_medium", "kl_f8_sd3", "sd3"),
    "sd35_medium": ("sd35_medium", "kl_f8_sd3", "sd3"),
    "sd35_large": ("sd35_large", "kl_f8_sd3", "sd3"),
    "flux_dev": ("flux_dev", "kl_f8_flux", "flux"),
    "flux_schnell": ("flux_schnell", "kl_f8_flux", "flux_schnell"),
    "pixart_sigma": ("pixart_sigma", "kl_f8_sdxl", "pixart"),
    "zimage": ("zimage", "kl_f8_flux", "zimage"),
    "tiny": ("tiny", "tiny", "tiny"),
}
"""Presets of network, autoencoder and text encoders by a family's name."""
_PATTERNS = (  # of published models' names, the first that is found
    (r"x4[-_]?upscaler", "x4_upscaler"),
    (r"instruct[-_]?pix2pix", "sd15_pix2pix"),
    (r"pixart[-_]?sigma", "pixart_sigma"),
    (r"z[-_]?image", "zimage"),
    (r"(stable-diffusion|sd)[-_]?3[-_.]?5[-_]?medium", "sd35_medium"),
    (r"(stable-diffusion|sd)[-_]?3[-_.]?5", "sd35_large"),
    (r"(stable-diffusion|sd)[-_]?3", "sd3"),
    (r"flux[-_.]?1?[-_]?schnell", "flux_schnell"),
    (r"flux[-_.]?1?[-_]?dev", "flux_dev"),
    (r"xl", "sdxl"),
    (r"(stable-diffusion|sd)[-_]?(v)?2([-_.]?[01])?[-_]base|sd[-_]?turbo", "sd21_base"),
    (r"(stable-diffusion|sd)[-_]?(v)?2|768-v", "sd21"),
    (r"(stable-diffusion|sd)[-_]?(v)?1|v1[-_.]?[45]", "sd15"),
)


def family_of(source: str) -> str | None:
    """The family of a preset's or a published model's name, None where the name tells none."""
    name = source.rstrip("/").rsplit("/", 1)[-1].lower()
    if name in FAMILIES:
        return name
    return next((family for pattern, family in _PATTERNS if re.search(pattern, name)), None)


def here(source: str) -> bool:
    """Whether a model's files are on this machine under this name; nothing is downloaded for a plan."""
    return source in SHIPPED or Path(source).exists()


def whole(source: str, key: str, said: list[str]) -> TextToImage:
    """A model to start from, on the meta device: the one named, or its family where it is not here.

    Raises ValueError naming `key` when it is neither here nor of a known family.
    """
    if here(source):
        return _on_meta(TextToImage.load(source))
    family = family_of(source)
    if family is None:
        raise ValueError(f"{key}: {source!r} is not here, and its name tells no family; one of {list(FAMILIES)} does")
    if family != source:
        said.append(f"{key}: {source!r} is not here; planned as the family {family}")
    unet, vae, text = FAMILIES[family]
    with torch.device("meta"):
        network, autoencoder = networks.build(PRESETS[unet]), Autoencoder(AUTOENCODERS[vae])
    network, autoencoder = network.requires_grad_(False).eval(), autoencoder.requires_grad_(False).eval()
    twice = network.out_channels == 2 * autoencoder.config.latent_channels  # as `ldm.pipeline.loading` takes it
    process = Process(variance="learned" if twice else "fixed")
    return _on_meta(TextToImage(network, LatentCodec.of(autoencoder), _empty(TEXTS[text]), process))


def _on_meta(model: TextToImage) -> TextToImage:
    model.network.to("meta")
    model.codec.autoencoder.to("meta")
    for tower in model.text:
        tower.to("meta")
    return model


def network(own: AnyNetwork | None, start: str | None, said: list[str]) -> AnyNetwork:
    """The network that trains: that of `start`, or of the config where there is none."""
    if start is None:
        if own is None:
            raise ValueError("task.network: missing, and task.start names no model whose network is trained further")
        return own
    if here(start):
        return network_of(start)
    family = family_of(start)
    if family is not None:
        said.append(f"task.start: {start!r} is not here; planned as the family {family}")
        return PRESETS[FAMILIES[family][0]]
    if own is None:
        raise ValueError(f"task.start: {start!r} is not here, and its name tells no family; {list(FAMILIES)} do")
    said.append(f"task.start: {start!r} is not here; planned as task.network")
    return own


def vae(source: str, of: AnyNetwork, said: list[str]) -> tuple[Autoencoder, AutoencoderConfig]:
    """The autoencoder; the one that a network of this kind usually has where it is not here."""
    folder = SHIPPED.get(source, Path(source))
    found = [p for p in (folder / "vae" / "config.json", folder / "config.json") if p.is_file()]
    if found:
        settings = decode(AutoencoderConfig, _plain(found[0]), str(found[0]))
    else:
        family = family_of(source)
        name = source if source in AUTOENCODERS else FAMILIES[family][1] if family else _usual(of)[0]
        if source not in (name, family):
            said.append(f"task.vae: {source!r} is not here; planned as {name}")
        settings = AUTOENCODERS[name]
    with torch.device("meta"):
        return Autoencoder(settings).requires_grad_(False).eval(), settings


def towers(source: str, of: AnyNetwork, said: list[str]) -> list[TextEncoder]:
    """The text towers; of the family whose states the network takes where they are not here."""
    if here(source) and source not in TEXTS:
        return _empty(tuple(tower.config for tower in load_towers(source)))
    name = source if source in TEXTS else family_of(source)
    name = FAMILIES[name][2] if name in FAMILIES else name
    if name is None:
        name = _usual(of)[1]
    if name != source and source not in FAMILIES:
        said.append(f"task.text: {source!r} is not here; planned as that of {name}")
    return _empty(TEXTS[name])


def _usual(of: AnyNetwork) -> tuple[str, str]:
    """Presets of the autoencoder and the text encoders that such a network usually has."""
    if (unet := usual_of_unet(of)) is not None:
        return unet
    return next((vae, text) for network, vae, text in FAMILIES.values() if PRESETS[network].kind == of.kind)


def _empty(configs: tuple[AnyText, ...]) -> list[TextEncoder]:
    with torch.device("meta"):
        return [build_encoder(c) for c in configs]


def _plain(path: Path) -> dict[str, Any]:
    """A model's config without the keys that say who wrote it."""
    return {k: v for k, v in read_json(path).items() if not k.startswith("_")}


def check_size(pixels: int, factor: int, key: str) -> int:
    """Latent pixels of a side. Raises ValueError for sides that the autoencoder does not divide."""
    if pixels < factor or pixels % factor:
        raise ValueError(f"{key}: {pixels} is not a multiple of the autoencoder's {factor} pixels")
    return pixels // factor
