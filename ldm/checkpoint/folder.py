"""The diffusers folder: strict both ways, safetensors only, whole or absent."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint import low_res, maps, weights
from ldm.checkpoint.families import FILES
from ldm.checkpoint.files import whole_folder
from ldm.checkpoint.index import UNUSED, check_index, read_scheduler
from ldm.checkpoint.model_text import open_encoders, open_towers, usual, write_one
from ldm.checkpoint.opened import Opened, component
from ldm.checkpoint.pipelines import (
    LCM,
    UPSCALE,
    VERSION,
    check_text,
    index_of,
    kind_of,
    network_class,
    pipeline_of,
    projected,
)
from ldm.checkpoint.settings import read_json, write_json
from ldm.config.load import decode, encode
from ldm.models.networks import AnyNetwork, diffusers_keys
from ldm.models.unet import UNetConfig
from ldm.models.vae.autoencoder import AutoencoderConfig

log = logging.getLogger(__name__)
NETWORKS = ("unet", "transformer")
"""Folders that a denoising network may be in."""
STEM = "diffusion_pytorch_model"


def write_folder(
    folder: Path,
    model: Opened,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    shard_bytes: int = weights.SHARD_BYTES,
) -> None:
    """Write a folder that diffusers' pipelines load; it replaces an old one only when it is whole.

    A "penultimate_norm" tower is written without its last layer, and the projection of a U-Net's single tower is left
    out, as in the published folders. Raises ValueError for text encoders that the family's pipeline does not have.
    """
    check_text(model)
    with whole_folder(folder) as beside:

        def part(name: str, config: Mapping[str, Any], source: weights.Source, stem: str) -> None:
            (beside / name).mkdir()
            write_json(beside / name / "config.json", config)
            weights.write_folder(beside / name, stem, source, dtype=dtype, variant=variant, shard_bytes=shard_bytes)

        part(component(model.network_config), _network_json(model.network_config), model.network, STEM)
        vae = {"_class_name": "AutoencoderKL", "_diffusers_version": VERSION, **encode(model.vae_config)}
        part("vae", vae, model.vae, STEM)
        unet = isinstance(model.network_config, UNetConfig)
        likes = (None,) * len(model.text) if unet else usual(model.network_config)
        for i, (tower, like) in enumerate(zip(model.text, likes, strict=False)):
            if tower.config.kind != "none":
                how: dict[str, Any] = {"dtype": dtype, "variant": variant, "shard_bytes": shard_bytes}
                write_one(beside, i, tower, like, projected(model, i), **how)
        (beside / "scheduler").mkdir()
        scheduler = {"_class_name": "DDIMScheduler", **model.scheduler}
        if pipeline_of(model) == LCM and scheduler["_class_name"] == "DDIMScheduler":  # which their pipeline cannot use
            scheduler["_class_name"] = "LCMScheduler"
        write_json(beside / "scheduler" / "scheduler_config.json", scheduler)
        if pipeline_of(model) == UPSCALE:
            low_res.write(beside, model.augmentation)
        write_json(beside / "model_index.json", index_of(model, scheduler["_class_name"]))


def open_folder(folder: Path, *, variant: str | None = None, lenient: bool = False) -> Opened:
    """A folder written by us or by diffusers; `lenient` leaves out a text tower's tensors that are not known.

    Raises ValueError for a part that is missing or of a kind we do not have, and for configs we cannot honour.
    """
    index = read_json(folder / "model_index.json")
    kind = check_index(index, folder)
    if left := [k for k in sorted(UNUSED) if (folder / k).is_dir()]:
        log.info("%s: not used: %s", folder, ", ".join(left))
    scheduler = read_scheduler(folder, index)
    config, network = open_network(folder / ("transformer" if kind in FILES else "unet"), variant=variant)
    if kind in FILES:
        text = open_encoders(folder, index, config, variant=variant, lenient=lenient)
    else:
        text = open_towers(folder, index, variant=variant, lenient=lenient)
    vae_config, vae = open_vae(folder / "vae", variant=variant)
    augmentation = low_res.read(folder, index) if index.get("_class_name") == UPSCALE else None
    return Opened(str(folder), config, network, vae_config, vae, text, scheduler, augmentation)


_VAE_DEFAULTS = {"block_out_channels": [64], "layers_per_block": 1, "sample_size": 32}
"""What diffusers takes where a file does not say it, and `AutoencoderConfig` takes the published families'."""


def network_in(folder: Path) -> Path | None:
    """The folder of the denoising network in a model's folder, None where there is none."""
    return next((folder / name for name in NETWORKS if (folder / name / "config.json").is_file()), None)


def open_network(folder: Path, *, variant: str | None = None) -> tuple[AnyNetwork, weights.Source]:
    """The network in its own folder, of whichever kind its class is."""
    given = read_json(folder / "config.json")
    kind = kind_of({"transformer": ["diffusers", given.get("_class_name")]})
    if kind in FILES:
        cls, forms = FILES[kind].config, FILES[kind].forms
        plain = forms({k: v for k, v in given.items() if k == "_class_name" or not k.startswith("_")}, str(folder))
        return decode(cls, plain, str(folder)), weights.open_folder(folder, STEM, variant)
    if folder.name == "transformer":
        known = [name for layout in FILES.values() for name in layout.network]
        raise ValueError(f"{folder}: _class_name {given.get('_class_name')!r} is not one of {known}")
    plain = _own(given, "UNet2DConditionModel", folder)
    return decode(UNetConfig, plain, str(folder)), weights.open_folder(folder, STEM, variant)


def open_vae(folder: Path, *, variant: str | None = None) -> tuple[AutoencoderConfig, weights.Source]:
    """The autoencoder in its own folder; the attention names of old files are understood."""
    given = _own(read_json(folder / "config.json"), "AutoencoderKL", folder)
    plain = _VAE_DEFAULTS | {k: v for k, v in given.items() if v is not None}
    return decode(AutoencoderConfig, plain, str(folder)), maps.modern_vae(weights.open_folder(folder, STEM, variant))


def _network_json(config: AnyNetwork) -> dict[str, Any]:
    about = {"_class_name": network_class(config), "_diffusers_version": VERSION}
    if isinstance(config, UNetConfig):
        heads = config.heads if len(set(config.heads)) > 1 else config.heads[0]
        config = replace(config, attention_head_dim=heads, num_attention_heads=None)
    return about | encode(diffusers_keys(config))


def _own(config: dict[str, Any], cls: str, where: Path) -> dict[str, Any]:
    name = config.get("_class_name") or cls
    if name not in (cls, f"Flax{cls}"):  # the same settings
        raise ValueError(f"{where}: _class_name {name!r} is not {cls!r}")
    return {k: v for k, v in config.items() if not k.startswith("_")}
