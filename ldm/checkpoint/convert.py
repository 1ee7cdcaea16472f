"""The diffusers folder, our own format on disk: strict both ways, safetensors only, whole or absent."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ldm.checkpoint import maps, weights
from ldm.checkpoint.tokenizers import load_tokenizer, save_tokenizer
from ldm.config.load import decode, encode
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.latents import LatentCodec
from ldm.models.text import Output, TextConfig, TextTower
from ldm.models.unet import UNet, UNetConfig

log = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)
STEM, TEXT_STEM = "diffusion_pytorch_model", "model"
SD, XL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
INPAINT, XL_INPAINT, LCM = (
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLInpaintPipeline",
    "LatentConsistencyModelPipeline",
)
_OURS = {"unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"}
_UNUSED = {"safety_checker", "feature_extractor", "image_encoder"}


@dataclasses.dataclass
class Components:
    """The parts of one model; `scheduler` is the dictionary of diffusers' `scheduler_config.json`."""

    unet: UNet
    autoencoder: Autoencoder
    codec: LatentCodec
    text: list[TextTower]
    scheduler: dict[str, Any]


def save_diffusers(
    folder: Path,
    *,
    unet: UNet,
    autoencoder: Autoencoder,
    text: Sequence[TextTower],
    scheduler: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    shard_bytes: int = weights.SHARD_BYTES,
) -> None:
    """Write a folder that diffusers' pipelines load; it replaces an old one only when it is whole.

    `dtype` stores the weights in another type. A "penultimate_norm" tower is written without its last layer, and the
    projection of a single tower is left out, as in the published folders.
    """
    folder = Path(folder)
    beside = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        _save_unet(beside / "unet", unet.config, weights.of_state(unet.state_dict()), dtype, shard_bytes)
        _save_vae(beside / "vae", autoencoder.config, weights.of_state(autoencoder.state_dict()), dtype, shard_bytes)
        for i, tower in enumerate(text):
            end = f"_{i + 1}" if i else ""
            projected = len(text) > 1 and i == len(text) - 1
            source = weights.of_state(tower.model.state_dict())
            _save_text(beside / f"text_encoder{end}", tower, source, projected, dtype, shard_bytes)
            save_tokenizer(beside / f"tokenizer{end}", tower.tokenizer)
        (beside / "scheduler").mkdir()
        settings = {"_class_name": "DDIMScheduler", **scheduler}
        _write(beside / "scheduler" / "scheduler_config.json", settings)
        _write(beside / "model_index.json", model_index(unet.config, text, settings["_class_name"]))
        _replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def model_index(config: UNetConfig, text: Sequence[TextTower], scheduler: str) -> dict[str, Any]:
    """`model_index.json`: the pipeline that fits the U-Net, and the class of each part."""
    two = len(text) > 1
    if config.time_cond_proj_dim is not None and not two:
        name = LCM
    elif config.in_channels == 2 * config.out_channels + 1:
        name = XL_INPAINT if two else INPAINT
    else:
        name = XL if two else SD
    index: dict[str, Any] = {"_class_name": name, "_diffusers_version": "0.30.0"}
    nothing = ["feature_extractor", "image_encoder"] + ([] if two else ["safety_checker"])
    index |= {key: [None, None] for key in nothing}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"scheduler": ["diffusers", scheduler]}
    for i in range(len(text)):
        end = f"_{i + 1}" if i else ""
        projected = two and i == len(text) - 1
        index[f"text_encoder{end}"] = ["transformers", "CLIPTextModelWithProjection" if projected else "CLIPTextModel"]
        index[f"tokenizer{end}"] = ["transformers", "CLIPTokenizer"]
    if two:
        index["force_zeros_for_empty_prompt"] = text[0].config.zero_empty
    else:
        index["requires_safety_checker"] = False
    return index


def _save_unet(
    folder: Path, config: UNetConfig, source: weights.Source, dtype: torch.dtype | None, shard_bytes: int
) -> None:
    heads = config.heads if len(set(config.heads)) > 1 else config.heads[0]
    plain = encode(dataclasses.replace(config, attention_head_dim=heads, num_attention_heads=None))
    _save_part(folder, "UNet2DConditionModel", plain, source, STEM, dtype, shard_bytes)


def _save_vae(
    folder: Path, config: AutoencoderConfig, source: weights.Source, dtype: torch.dtype | None, shard_bytes: int
) -> None:
    _save_part(folder, "AutoencoderKL", encode(config), source, STEM, dtype, shard_bytes)


def _save_text(
    folder: Path,
    tower: TextTower,
    source: Mapping[str, weights.Entry],
    projected: bool,
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> None:
    config = tower.config
    names = dict(source)
    layers = config.layers - (config.output == "penultimate_norm")
    names = {k: e for k, e in names.items() if not k.startswith(f"transformer.resblocks.{layers}.")}
    if not projected:
        names.pop("text_projection", None)
    hf = maps.follow(maps.text_to_hf(names), names, "text tower")
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    plain = text_config_to_hf(dataclasses.replace(config, output="last", layers=layers), tower.tokenizer.vocab_size)
    _save_part(folder, None, {"architectures": [name], **plain}, hf, TEXT_STEM, dtype, shard_bytes)


def text_config_to_hf(config: TextConfig, vocabulary: int) -> dict[str, Any]:
    """`config.json` of a CLIPTextModel; `vocabulary` is the tokenizer's size, whose last two ids are the markers."""
    return {
        "model_type": "clip_text_model",
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width or 4 * config.width,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
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
    }


def _save_part(
    folder: Path,
    cls: str | None,
    config: Mapping[str, Any],
    source: weights.Source,
    stem: str,
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = {} if cls is None else {"_class_name": cls, "_diffusers_version": "0.30.0"}
    _write(folder / "config.json", {**names, **config})
    weights.write_folder(folder, stem, source, dtype=dtype, shard_bytes=shard_bytes)


def load_diffusers(folder: Path, *, variant: str | None = None, dtype: torch.dtype = torch.float32) -> Components:
    """Read a folder written by us or by diffusers; weights become `dtype`.

    Raises ValueError for a part that is missing or of a kind we do not have, and for weights that do not fit.
    """
    folder = Path(folder)
    index = _read(folder / "model_index.json")
    unknown = [k for k, v in index.items() if isinstance(v, list) and v[0] and k not in _OURS | _UNUSED]
    if unknown:
        raise ValueError(f"{folder}: has part(s) {unknown}; known are {sorted(_OURS)}")
    if left := [k for k in sorted(_UNUSED) if (folder / k).is_dir()]:
        log.info("%s: not used: %s", folder, ", ".join(left))
    unet = load_unet(folder / "unet", variant=variant, dtype=dtype)
    autoencoder = load_autoencoder(folder / "vae", variant=variant, dtype=dtype)
    two = (folder / "text_encoder_2").is_dir()
    towers = []
    for end in ["", "_2"] if two else [""]:
        towers.append(
            load_text(
                folder / f"text_encoder{end}",
                folder / f"tokenizer{end}",
                output="penultimate" if two else "last",
                zero_empty=two and bool(index.get("force_zeros_for_empty_prompt", True)),
                variant=variant,
                dtype=dtype,
            )
        )
    scheduler = _read(folder / "scheduler" / "scheduler_config.json")
    return Components(unet, autoencoder, LatentCodec.of(autoencoder), towers, scheduler)


def load_unet(folder: Path, *, variant: str | None = None, dtype: torch.dtype = torch.float32) -> UNet:
    """A U-Net from its own folder."""
    config = decode(UNetConfig, _own(_read(folder / "config.json"), "UNet2DConditionModel", folder), str(folder))
    return _fill(UNet, config, weights.open_folder(folder, STEM, variant), dtype, folder)


def load_autoencoder(folder: Path, *, variant: str | None = None, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """An autoencoder from its own folder; the attention names of old files are understood."""
    config = decode(AutoencoderConfig, _own(_read(folder / "config.json"), "AutoencoderKL", folder), str(folder))
    source = maps.modern_vae(weights.open_folder(folder, STEM, variant))
    return _fill(Autoencoder, config, source, dtype, folder)


def load_text(
    folder: Path,
    tokenizer: Path,
    *,
    output: Output = "last",
    zero_empty: bool = False,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> TextTower:
    """A frozen text tower from HF `CLIPTextModel(WithProjection)` files."""
    hf = _read(folder / "config.json")
    if hf.get("model_type") not in ("clip_text_model", "clip"):
        raise ValueError(f"{folder}: model_type {hf.get('model_type')!r} is not 'clip_text_model'")
    source = maps.without_constants(weights.open_folder(folder, TEXT_STEM, variant))
    native = maps.follow(maps.text_from_hf(source), source, str(folder))
    bpe, pad = load_tokenizer(tokenizer, hf["max_position_embeddings"])
    config = TextConfig(
        width=hf["hidden_size"],
        heads=hf["num_attention_heads"],
        layers=hf["num_hidden_layers"],
        mlp_width=hf["intermediate_size"] if hf["intermediate_size"] != 4 * hf["hidden_size"] else None,
        context_length=hf.get("max_position_embeddings", 77),
        vocab_size=hf["vocab_size"],
        activation=hf.get("hidden_act", "quick_gelu"),
        projection=native["text_projection"].shape[1] if "text_projection" in native else None,
        output=output,
        pad=pad,
        bpe=bpe,
        zero_empty=zero_empty,
    )
    tower = TextTower(config)
    weights.check_keys(str(folder), {k: v.shape for k, v in tower.model.state_dict().items()}, weights.shapes(native))
    tower.model.load_state_dict(weights.read_all(native, dtype), strict=True, assign=True)
    return tower.to(dtype).requires_grad_(False).eval()


def _fill(cls: Any, config: Any, source: weights.Source, dtype: torch.dtype, where: Path) -> Any:
    """Build a module without initialising it and give it the tensors of `source`."""
    with torch.device("meta"):
        model = cls(config)
    weights.check_keys(str(where), {k: v.shape for k, v in model.state_dict().items()}, weights.shapes(source))
    model.load_state_dict(weights.read_all(source, dtype), strict=True, assign=True)
    return model.eval()


def _own(config: dict[str, Any], cls: str, where: Path) -> dict[str, Any]:
    name = config.get("_class_name", cls)
    if name != cls:
        raise ValueError(f"{where}: _class_name {name!r} is not {cls!r}")
    return {k: v for k, v in config.items() if not k.startswith("_")}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a diffusers folder")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected keys and values")
    return data


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(data), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _replace(beside: Path, folder: Path) -> None:
    """Rename the new folder into place; the old one is kept until then."""
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        os.rename(folder, old)
    os.rename(beside, folder)
    shutil.rmtree(old, ignore_errors=True)
