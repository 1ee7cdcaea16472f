"""`model_index.json` of a diffusers folder: which pipeline it is for, and the class of each of its parts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoint.families import FILES
from ldm.checkpoint.families.flux import KONTEXT
from ldm.checkpoint.pipelines import (
    INPAINT,
    NAMES,
    ONE,
    PIPELINES,
    SD,
    TEXT_CLASSES,
    TOKENIZERS,
    TWO,
    UPSCALE,
    kind_of,
    numbered,
)
from ldm.checkpoint.scheduler_classes import DEFAULTS
from ldm.checkpoint.schedulers import scheduler_from_diffusers
from ldm.checkpoint.settings import read_json

log = logging.getLogger(__name__)
UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")
KEYS = frozenset(key for defaults in DEFAULTS.values() for key in defaults)
"""Every key that some scheduler class takes; files carry those of other classes along."""
_HARMLESS = ("requires_safety_checker", "add_watermarker", "force_zeros_for_empty_prompt")
_OTHERS = {
    "StableDiffusion3": "a relative of Stable Diffusion 3",
    "Flux": "a relative of FLUX.1",
    "FluxControl": "FLUX.1 conditioned by a picture, such as its depth",
    "FluxPrior": "FLUX.1 Redux, which draws from picture embeddings",
    "Flux2": "FLUX.2, whose text encoder is a language model",
    "PixArt": "a relative of PixArt",
    "Chroma": "Chroma, a relative of FLUX.1",
    "ZImage": "a relative of Z-Image",
    "QwenImage": "Qwen-Image, whose text encoder is a language model",
    "Sana": "SANA, whose text encoder is Gemma",
    "Lumina": "Lumina, whose text encoder is Gemma",
    "HunyuanDiT": "Hunyuan-DiT",
    "AuraFlow": "AuraFlow",
    "IF": "DeepFloyd IF, which draws pixels from T5's text",
    "Kandinsky": "Kandinsky, which draws from picture embeddings",
    "AltDiffusion": "AltDiffusion, whose text encoder is XLM-RoBERTa",
    "LDMTextToImage": "the first latent diffusion, whose text encoder is a BERT",
    "StableCascade": "Stable Cascade",
    "Wuerstchen": "Wuerstchen",
    "Kolors": "Kolors, whose text encoder is ChatGLM",
    "StableUnCLIP": "Stable unCLIP, which draws from picture embeddings",
    "StableDiffusionLatentUpscale": "an upscaler",
    "StableDiffusionDepth2Img": "conditioned by depth",
    "StableVideoDiffusion": "a video model",
    "AnimateDiff": "a video model",
    "TextToVideo": "a video model",
}


def check_index(index: Mapping[str, Any], where: Path) -> str:
    """The kind of network that the folder holds.

    Raises ValueError for a pipeline, a part or a setting that is not read here, naming it and what is.
    """
    cls = index.get("_class_name")
    if cls is not None and cls not in PIPELINES:
        known = [text for start, text in _OTHERS.items() if str(cls).startswith(start)]
        about = f" ({known[-1]})" if known else ""
        raise ValueError(f"{where}: _class_name {cls!r}{about} is not one of {list(PIPELINES)}")
    if cls == KONTEXT:
        log.warning("%s: read as FLUX.1, which draws from text; editing by a picture is not known here", where)
    kind = kind_of(index)
    parts = {k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2}
    there = {k: v[1] for k, v in parts.items() if v[1] is not None}
    if cls in TWO and there.keys() >= {"text_encoder_2"} and "text_encoder" not in there and "unet" in there:
        raise ValueError(f"{where}: has no text_encoder: SDXL's refiner is not supported, only its base model is")
    classes = _classes(kind)
    upscales = cls == UPSCALE
    known = [*classes, *UNUSED, "scheduler", *["low_res_scheduler"] * upscales]
    if unknown := sorted(k for k in there if k not in known):
        raise ValueError(f"{where}: has part(s) {unknown}; known are {known}")
    for name, found in there.items():
        if name in classes and found not in classes[name]:
            raise ValueError(f"{where}: {name} {found!r} is not one of {list(classes[name])}")
    rest = {k: v for k, v in index.items() if k not in parts and not k.startswith("_") and k not in _HARMLESS}
    rest = {k: v for k, v in rest.items() if not (upscales and k == "max_noise_level")}
    if changing := sorted(k for k, v in rest.items() if v not in (None, False)):
        raise ValueError(f"{where}: {changing[0]} {index[changing[0]]!r} is not supported; known are {list(_HARMLESS)}")
    return kind


def _classes(kind: str) -> dict[str, tuple[str, ...]]:
    """The classes of a folder's parts that are read here."""
    network = {"transformer": FILES[kind].network} if kind in FILES else {"unet": ("UNet2DConditionModel",)}
    text = FILES[kind].text if kind in FILES else ("clip", "clip")
    out = network | {"vae": ("AutoencoderKL",)}
    out |= {numbered("text_encoder", i): TEXT_CLASSES[k] for i, k in enumerate(text)}
    return out | {numbered("tokenizer", i): TOKENIZERS[k] for i, k in enumerate(text)}


def encoders_there(index: Mapping[str, Any], kind: str, folder: Path) -> list[bool]:
    """Of a folder of a transformer: which of the family's text encoders it has, as the index says, or the folders.

    Raises ValueError naming those that the family cannot do without.
    """
    layout, found = FILES[kind], []
    for i in range(len(layout.text)):
        part = index.get(numbered("text_encoder", i), ...)
        listed = part is not ... and isinstance(part, list) and len(part) == 2 and part[1] is not None
        found.append(listed if part is not ... else (folder / numbered("text_encoder", i)).is_dir())
    missing = [i for i, there in enumerate(found) if not there and i < layout.needed]
    if kind == "sd3" and found == [True, False, True]:  # one CLIP alone, or both; T5 stands behind both
        missing = [1]
    if missing:
        names = " and ".join(f"{numbered('text_encoder', i)} ({NAMES[layout.text[i]]})" for i in missing)
        raise ValueError(f"{folder}: has no {names}, which {layout.title} needs")
    return found


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
