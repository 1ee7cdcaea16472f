"""`model_index.json` of a diffusers folder: which pipeline it is for, and the class of each of its parts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoint.scheduler_classes import DEFAULTS
from ldm.checkpoint.schedulers import scheduler_from_diffusers
from ldm.checkpoint.settings import read_json

log = logging.getLogger(__name__)
SD, XL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
INPAINT, XL_INPAINT = "StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline"
LCM = "LatentConsistencyModelPipeline"
ONE = (SD, INPAINT, "StableDiffusionImg2ImgPipeline", LCM, "LatentConsistencyModelImg2ImgPipeline")
TWO = (XL, XL_INPAINT, "StableDiffusionXLImg2ImgPipeline")
"""Pipelines whose folders are read here, with one text encoder and with two."""
_TEXT, _TOKENIZER = ("CLIPTextModel", "CLIPTextModelWithProjection"), ("CLIPTokenizer", "CLIPTokenizerFast")
CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": _TEXT,
    "text_encoder_2": _TEXT,
    "tokenizer": _TOKENIZER,
    "tokenizer_2": _TOKENIZER,
}
"""The classes of parts that are read here."""
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
KEYS = frozenset(key for defaults in DEFAULTS.values() for key in defaults)
"""Every key that some scheduler class takes; files carry those of other classes along."""
_HARMLESS = ("requires_safety_checker", "add_watermarker", "force_zeros_for_empty_prompt")
_OTHERS = {
    "StableDiffusion3": "Stable Diffusion 3, a transformer",
    "Flux": "FLUX, a transformer",
    "PixArt": "PixArt, a transformer",
    "IF": "DeepFloyd IF, which draws pixels from T5's text",
    "Kandinsky": "Kandinsky, which draws from picture embeddings",
    "AltDiffusion": "AltDiffusion, whose text encoder is XLM-RoBERTa",
    "LDMTextToImage": "the first latent diffusion, whose text encoder is a BERT",
    "StableCascade": "Stable Cascade",
    "Wuerstchen": "Wuerstchen",
    "Kolors": "Kolors, whose text encoder is ChatGLM",
    "StableUnCLIP": "Stable unCLIP, which draws from picture embeddings",
    "StableDiffusionUpscale": "an upscaler",
    "StableDiffusionLatentUpscale": "an upscaler",
    "StableDiffusionDepth2Img": "conditioned by depth",
    "StableDiffusionInstructPix2Pix": "an editor by instructions",
    "StableDiffusionXLInstructPix2Pix": "an editor by instructions",
    "StableVideoDiffusion": "a video model",
    "AnimateDiff": "a video model",
    "TextToVideo": "a video model",
}


def check_index(index: Mapping[str, Any], where: Path) -> None:
    """Raise ValueError for a pipeline, a part or a setting that is not read here, naming it and what is."""
    cls = index.get("_class_name")
    if cls is not None and cls not in (*ONE, *TWO):
        known = [text for start, text in _OTHERS.items() if str(cls).startswith(start)]
        about = f" ({known[-1]})" if known else ""
        raise ValueError(f"{where}: _class_name {cls!r}{about} is not one of {[*ONE, *TWO]}")
    parts = {k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2}
    there = {k: v[1] for k, v in parts.items() if v[1] is not None}
    if cls in TWO and there.keys() >= {"text_encoder_2"} and "text_encoder" not in there and "unet" in there:
        raise ValueError(f"{where}: has no text_encoder: SDXL's refiner is not supported, only its base model is")
    known = [*CLASSES, *UNUSED, "scheduler"]
    if unknown := sorted(k for k in there if k not in known):
        raise ValueError(f"{where}: has part(s) {unknown}; known are {known}")
    for name, found in there.items():
        if name in CLASSES and found not in CLASSES[name]:
            raise ValueError(f"{where}: {name} {found!r} is not one of {list(CLASSES[name])}")
    rest = {k: v for k, v in index.items() if k not in parts and not k.startswith("_") and k not in _HARMLESS}
    if changing := sorted(k for k, v in rest.items() if v not in (None, False)):
        raise ValueError(f"{where}: {changing[0]} {index[changing[0]]!r} is not supported; known are {list(_HARMLESS)}")


def two_towers(index: Mapping[str, Any], folder: Path) -> bool:
    """Whether the model has two text encoders, as the index says, or the folders where it does not."""
    part = index.get("text_encoder_2", ...)
    if part is ...:
        return (folder / "text_encoder_2").is_dir() and index.get("_class_name") not in ONE
    return isinstance(part, list) and len(part) == 2 and part[1] is not None


def read_scheduler(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """`scheduler_config.json` as diffusers' pipeline of this index makes its scheduler of it.

    The index tells the class; Stable Diffusion's pipelines with one text encoder take `steps_offset` 1 and do not clip
    latents, whatever old files say. Raises ValueError for a process that is not known.
    """
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    if unknown := sorted(k for k in config if not k.startswith("_") and k not in KEYS):
        log.info("%s: no scheduler knows these keys: %s", folder, ", ".join(unknown))
    part = index.get("scheduler")
    own, told = config.get("_class_name"), part[1] if isinstance(part, list) and len(part) == 2 else None
    if own is not None:
        scheduler_from_diffusers(config)
    if told is not None and told != own:
        if own is not None:
            log.warning("%s: model_index.json says %s, scheduler_config.json %s: the first is taken", folder, told, own)
        config = config | {"_class_name": told}
    if index.get("_class_name") in (SD, INPAINT, "StableDiffusionImg2ImgPipeline"):
        leading = config.get("timestep_spacing") in (None, "leading")
        config |= {"steps_offset": 1} if leading and config.get("steps_offset") != 1 else {}
        config |= {"clip_sample": False} if config.get("clip_sample") is not False else {}
    scheduler_from_diffusers(config)
    return config
