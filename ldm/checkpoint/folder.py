"""The diffusers folder: strict both ways, safetensors only, whole or absent."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint import maps, towers, weights
from ldm.checkpoint.index import INPAINT, LCM, SD, UNUSED, XL, XL_INPAINT, check_index, read_scheduler, two_towers
from ldm.checkpoint.opened import Opened
from ldm.checkpoint.settings import read_json, write_json
from ldm.checkpoint.tokenizers import save_tokenizer
from ldm.checkpoint.towers import open_text
from ldm.config.load import decode, encode
from ldm.models.networks import AnyNetwork
from ldm.models.text import Output, build_tokenizer
from ldm.models.unet import UNetConfig
from ldm.models.vae.autoencoder import AutoencoderConfig

log = logging.getLogger(__name__)
NETWORKS = ("unet",)
"""Folders that a denoising network may be in."""
STEM, TEXT_STEM = "diffusion_pytorch_model", towers.STEM
VERSION = "0.30.0"  # of diffusers, whose format this is


def write_folder(
    folder: Path,
    model: Opened,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    shard_bytes: int = weights.SHARD_BYTES,
) -> None:
    """Write a folder that diffusers' pipelines load; it replaces an old one only when it is whole.

    A "penultimate_norm" tower is written without its last layer, and the projection of a single tower is left out, as
    in the published folders.
    """
    beside = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)

    def part(name: str, config: Mapping[str, Any], source: weights.Source, stem: str) -> None:
        (beside / name).mkdir()
        write_json(beside / name / "config.json", config)
        weights.write_folder(beside / name, stem, source, dtype=dtype, variant=variant, shard_bytes=shard_bytes)

    try:
        part("unet", _unet_json(model.unet_config), model.unet, STEM)
        vae = {"_class_name": "AutoencoderKL", "_diffusers_version": VERSION, **encode(model.vae_config)}
        part("vae", vae, model.vae, STEM)
        for i, tower in enumerate(model.text):
            config, source = towers.text_part(tower, projected=len(model.text) > 1 and i == len(model.text) - 1)
            part(_numbered("text_encoder", i), config, source, TEXT_STEM)
            tokenizer = build_tokenizer(tower.config)
            save_tokenizer(beside / _numbered("tokenizer", i), tokenizer, tower.config.added)
        (beside / "scheduler").mkdir()
        scheduler = {"_class_name": "DDIMScheduler", **model.scheduler}
        if _pipeline(model) == LCM and scheduler["_class_name"] == "DDIMScheduler":  # which their pipeline cannot use
            scheduler["_class_name"] = "LCMScheduler"
        write_json(beside / "scheduler" / "scheduler_config.json", scheduler)
        write_json(beside / "model_index.json", _index(model, scheduler["_class_name"]))
        _replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def open_folder(folder: Path, *, variant: str | None = None, lenient: bool = False) -> Opened:
    """A folder written by us or by diffusers; `lenient` leaves out a text tower's tensors that are not known.

    Raises ValueError for a part that is missing or of a kind we do not have, and for configs we cannot honour.
    """
    index = read_json(folder / "model_index.json")
    check_index(index, folder)
    if left := [k for k in sorted(UNUSED) if (folder / k).is_dir()]:
        log.info("%s: not used: %s", folder, ", ".join(left))
    scheduler = read_scheduler(folder, index)
    two = two_towers(index, folder)
    zeros = two and bool(index.get("force_zeros_for_empty_prompt", True))
    output: Output = "penultimate" if two else "last"
    text = []
    for i in range(1 + two):
        where, tokenizer = folder / _numbered("text_encoder", i), folder / _numbered("tokenizer", i)
        text.append(open_text(where, tokenizer, output=output, zero_empty=zeros, variant=variant, lenient=lenient))
    unet_config, unet = open_network(folder / "unet", variant=variant)
    vae_config, vae = open_vae(folder / "vae", variant=variant)
    return Opened(str(folder), unet_config, unet, vae_config, vae, tuple(text), scheduler)


_VAE_DEFAULTS = {"block_out_channels": [64], "layers_per_block": 1, "sample_size": 32}
"""What diffusers takes where a file does not say it, and `AutoencoderConfig` takes the published families'."""


def network_in(folder: Path) -> Path | None:
    """The folder of the denoising network in a model's folder, None where there is none."""
    return next((folder / name for name in NETWORKS if (folder / name / "config.json").is_file()), None)


def open_network(folder: Path, *, variant: str | None = None) -> tuple[AnyNetwork, weights.Source]:
    """The network in its own folder."""
    plain = _own(read_json(folder / "config.json"), "UNet2DConditionModel", folder)
    return decode(UNetConfig, plain, str(folder)), weights.open_folder(folder, STEM, variant)


def open_vae(folder: Path, *, variant: str | None = None) -> tuple[AutoencoderConfig, weights.Source]:
    """The autoencoder in its own folder; the attention names of old files are understood."""
    given = _own(read_json(folder / "config.json"), "AutoencoderKL", folder)
    plain = _VAE_DEFAULTS | {k: v for k, v in given.items() if v is not None}
    return decode(AutoencoderConfig, plain, str(folder)), maps.modern_vae(weights.open_folder(folder, STEM, variant))


def _numbered(name: str, index: int) -> str:
    return f"{name}_{index + 1}" if index else name


def _index(model: Opened, scheduler: str) -> dict[str, Any]:
    """`model_index.json`: the pipeline that fits the U-Net, and the class of each part."""
    two = len(model.text) > 1
    index: dict[str, Any] = {"_class_name": _pipeline(model), "_diffusers_version": VERSION}
    nothing = ["feature_extractor", "image_encoder"] + ([] if two else ["safety_checker"])
    index |= {key: [None, None] for key in nothing}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"scheduler": ["diffusers", scheduler]}
    for i in range(len(model.text)):
        projected = two and i == len(model.text) - 1
        cls = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
        index[_numbered("text_encoder", i)] = ["transformers", cls]
        index[_numbered("tokenizer", i)] = ["transformers", "CLIPTokenizer"]
    if two:
        index["force_zeros_for_empty_prompt"] = model.text[0].config.zero_empty
    else:
        index["requires_safety_checker"] = False
    return index


def _pipeline(model: Opened) -> str:
    """The class of the pipeline that fits."""
    config, two = model.unet_config, len(model.text) > 1
    scheduler = model.scheduler.get("_class_name", "DDIMScheduler"), model.scheduler.get("timestep_spacing")
    progressive = scheduler == ("DDIMScheduler", "trailing")  # a student that is told its guidance and drawn by DDIM
    if config.time_cond_proj_dim is not None and not two and not progressive:
        return LCM
    if config.in_channels == 2 * config.out_channels + 1:
        return XL_INPAINT if two else INPAINT
    return XL if two else SD


def _unet_json(config: UNetConfig) -> dict[str, Any]:
    heads = config.heads if len(set(config.heads)) > 1 else config.heads[0]
    plain = encode(replace(config, attention_head_dim=heads, num_attention_heads=None))
    del plain["kind"]  # which the class tells
    return {"_class_name": "UNet2DConditionModel", "_diffusers_version": VERSION, **plain}


def _own(config: dict[str, Any], cls: str, where: Path) -> dict[str, Any]:
    name = config.get("_class_name") or cls
    if name not in (cls, f"Flax{cls}"):  # the same settings
        raise ValueError(f"{where}: _class_name {name!r} is not {cls!r}")
    return {k: v for k, v in config.items() if not k.startswith("_")}


def _replace(beside: Path, folder: Path) -> None:
    """Rename the new folder into place; the old one is kept until then."""
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        os.rename(folder, old)
    os.rename(beside, folder)
    shutil.rmtree(old, ignore_errors=True)
