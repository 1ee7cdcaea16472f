"""Image encoders of CLIP in files: transformers' folders of `CLIPVisionModelWithProjection`, or of a whole CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint import maps, weights
from ldm.checkpoint.settings import read_json
from ldm.checkpoint.towers import STEM
from ldm.checkpoint.weights import Entry, Source
from ldm.config.load import decode
from ldm.models.text.vision import ImageEncoder, Sight, VisionConfig, build_vision

_KINDS = ("clip_vision_model", "clip")
_ONLY: dict[str, Any] = {"layer_norm_eps": 1e-5, "num_channels": 3, "attention_dropout": 0.0,
                         "quantization_config": None}  # fmt: skip
_KEYS = frozenset(VisionConfig.__dataclass_fields__)


def is_image_encoder(folder: Path) -> bool:
    """Whether a folder is one of transformers' with an image tower of CLIP."""
    return (folder / "config.json").is_file() and read_json(folder / "config.json").get("model_type") in _KINDS


def vision_settings(folder: Path) -> VisionConfig:
    """The settings, with transformers' defaults. Raises ValueError for another model and for what is not supported."""
    told = read_json(folder / "config.json")
    kind = told.get("model_type")
    if kind not in _KINDS:
        raise ValueError(f"{folder}: no image encoder: model_type {kind!r} is not one of {list(_KINDS)}")
    if kind == "clip":
        whole = {"projection_dim": told["projection_dim"]} if "projection_dim" in told else {}
        told = {**(told.get("vision_config") or told.get("vision_config_dict") or {}), **whole}
    for key, only in _ONLY.items():
        if told.get(key) not in (None, only):
            raise ValueError(f"{folder}: {key} {told[key]!r} is not supported; only {only!r} is")
    return decode(
        VisionConfig, {k: v for k, v in told.items() if k in _KEYS and v is not None}, f"{folder}: config.json"
    )


def open_image_encoder(folder: Path, variant: str | None = None) -> tuple[VisionConfig, dict[str, Entry]]:
    """The settings, and the tensors by native name, not read yet."""
    config = vision_settings(folder)
    source = _own(weights.open_folder(folder, STEM, variant))
    if "visual_projection.weight" not in source:
        raise ValueError(f"{folder}: an image encoder without visual_projection.weight; only "
                         "CLIPVisionModelWithProjection and a whole CLIP have it")  # fmt: skip
    found = maps.follow(maps.vision_from_hf(source), source, str(folder))
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in build_vision(config).state_dict().items()}
    weights.check_keys(f"{folder}: image encoder", shapes, weights.shapes(found))
    return config, found


def load_image_encoder(folder: Path, variant: str | None = None) -> ImageEncoder:
    """An image encoder, frozen, in float32. Raises ValueError for another model and for tensors that do not fit."""
    config, source = open_image_encoder(folder, variant)
    with torch.device("meta"):
        model = build_vision(config)
    model.load_state_dict(weights.read_all(source, torch.float32, str(folder)), strict=True, assign=True)
    return ImageEncoder(model, Sight(config.image_size), str(folder))


def _own(source: Source) -> dict[str, Entry]:
    """Without the text half of a whole CLIP, and the constants that old files carry."""
    others = ("text_model.", "text_projection.", "logit_scale")
    return {k: e for k, e in source.items() if not k.startswith(others) and not k.endswith(".position_ids")}


def beside(file: Path, states: bool, features: int) -> Path | None:
    """The folder of the image encoder that an adapter's file was published with, by its place and its width.

    As in the authors' repository it is `image_encoder` beside the file, or that of `models` beside the file's folder.
    """
    for folder in (file.parent / "image_encoder", file.parent.parent / "models" / "image_encoder"):
        if is_image_encoder(folder):
            config = vision_settings(folder)
            if (config.hidden_size if states else config.projection_dim) == features:
                return folder
    return None
