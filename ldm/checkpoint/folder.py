"""The diffusers folder: strict both ways, safetensors only, whole or absent."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint import maps, weights
from ldm.checkpoint.layouts import say_left
from ldm.checkpoint.opened import Opened, OpenedText
from ldm.checkpoint.tokenizers import load_tokenizer, save_tokenizer
from ldm.config.load import decode, encode
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.text import Output, TextConfig, build_tokenizer
from ldm.models.unet import UNetConfig

log = logging.getLogger(__name__)
STEM, TEXT_STEM = "diffusion_pytorch_model", "model"
SD, XL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
INPAINT, XL_INPAINT = "StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline"
LCM = "LatentConsistencyModelPipeline"
VERSION = "0.30.0"  # of diffusers, whose format this is
_OURS = {"unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"}
_UNUSED = {"safety_checker", "feature_extractor", "image_encoder"}


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
            config, source = _text_part(tower, projected=len(model.text) > 1 and i == len(model.text) - 1)
            part(_numbered("text_encoder", i), config, source, TEXT_STEM)
            save_tokenizer(beside / _numbered("tokenizer", i), build_tokenizer(tower.config))
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
    unknown = [k for k, v in index.items() if isinstance(v, list) and v[0] and k not in _OURS | _UNUSED]
    if unknown:
        raise ValueError(f"{folder}: has part(s) {unknown}; known are {sorted(_OURS)}")
    if left := [k for k in sorted(_UNUSED) if (folder / k).is_dir()]:
        log.info("%s: not used: %s", folder, ", ".join(left))
    two = (folder / "text_encoder_2").is_dir()
    zeros = two and bool(index.get("force_zeros_for_empty_prompt", True))
    output: Output = "penultimate" if two else "last"
    text = []
    for i in range(1 + two):
        where, tokenizer = folder / _numbered("text_encoder", i), folder / _numbered("tokenizer", i)
        text.append(open_text(where, tokenizer, output=output, zero_empty=zeros, variant=variant, lenient=lenient))
    unet_config, unet = open_unet(folder / "unet", variant=variant)
    vae_config, vae = open_vae(folder / "vae", variant=variant)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    return Opened(str(folder), unet_config, unet, vae_config, vae, tuple(text), scheduler)


def open_unet(folder: Path, *, variant: str | None = None) -> tuple[UNetConfig, weights.Source]:
    """The U-Net in its own folder."""
    plain = _own(read_json(folder / "config.json"), "UNet2DConditionModel", folder)
    return decode(UNetConfig, plain, str(folder)), weights.open_folder(folder, STEM, variant)


def open_vae(folder: Path, *, variant: str | None = None) -> tuple[AutoencoderConfig, weights.Source]:
    """The autoencoder in its own folder; the attention names of old files are understood."""
    plain = _own(read_json(folder / "config.json"), "AutoencoderKL", folder)
    return decode(AutoencoderConfig, plain, str(folder)), maps.modern_vae(weights.open_folder(folder, STEM, variant))


def open_text(
    folder: Path,
    tokenizer: Path,
    *,
    output: Output = "last",
    zero_empty: bool = False,
    variant: str | None = None,
    lenient: bool = False,
) -> OpenedText:
    """A text tower from HF `CLIPTextModel(WithProjection)` files."""
    hf = read_json(folder / "config.json")
    if hf.get("model_type") not in ("clip_text_model", "clip"):
        raise ValueError(f"{folder}: model_type {hf.get('model_type')!r} is not 'clip_text_model'")
    source = maps.without_constants(weights.open_folder(folder, TEXT_STEM, variant))
    left: list[str] = []
    native = maps.follow(maps.text_from_hf(source), source, str(folder), left)
    say_left(folder, {"text tower": left}, len(source), lenient=lenient)
    context, width = hf.get("max_position_embeddings", 77), hf["hidden_size"]
    bpe, pad = load_tokenizer(tokenizer, context)
    config = TextConfig(
        width=width,
        heads=hf["num_attention_heads"],
        layers=hf["num_hidden_layers"],
        mlp_width=hf["intermediate_size"] if hf["intermediate_size"] != 4 * width else None,
        context_length=context,
        vocab_size=hf.get("vocab_size", 49408),
        activation=hf.get("hidden_act", "quick_gelu"),
        projection=native["text_projection"].shape[1] if "text_projection" in native else None,
        output=output,
        pad=pad,
        bpe=bpe,
        zero_empty=zero_empty,
    )
    return OpenedText(config, native)


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
    return {"_class_name": "UNet2DConditionModel", "_diffusers_version": VERSION, **plain}


def _text_part(tower: OpenedText, *, projected: bool) -> tuple[dict[str, Any], weights.Source]:
    """`config.json` and HF-named weights."""
    layers = tower.config.layers - (tower.config.output == "penultimate_norm")
    cut = (f"transformer.resblocks.{layers}.",) + (() if projected else ("text_projection",))
    source = {k: e for k, e in tower.source.items() if not k.startswith(cut)}
    hf = maps.follow(maps.text_to_hf(source), source, "text tower")
    config, vocabulary = tower.config, build_tokenizer(tower.config).vocab_size
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width or 4 * config.width,
        "num_attention_heads": config.heads,
        "num_hidden_layers": layers,
        "max_position_embeddings": config.context_length,
        "vocab_size": config.vocab_size,
        "projection_dim": config.projection or config.width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1 if config.pad == "eot" else 0,
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
    }, hf


def _own(config: dict[str, Any], cls: str, where: Path) -> dict[str, Any]:
    name = config.get("_class_name", cls)
    if name != cls:
        raise ValueError(f"{where}: _class_name {name!r} is not {cls!r}")
    return {k: v for k, v in config.items() if not k.startswith("_")}


def read_json(path: Path) -> dict[str, Any]:
    """Keys and values of a file; ValueError if it is missing or something else."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a diffusers folder")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected keys and values")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write keys and values."""
    path.write_text(json.dumps(dict(data), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _replace(beside: Path, folder: Path) -> None:
    """Rename the new folder into place; the old one is kept until then."""
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        os.rename(folder, old)
    os.rename(beside, folder)
    shutil.rmtree(old, ignore_errors=True)
