"""Which of diffusers' pipelines a model's folder is for: the classes that are read of each family, and the written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.checkpoint.families import FILES
from ldm.checkpoint.families.base import PICTURES
from ldm.checkpoint.opened import Opened, component
from ldm.diffusion.augmentation import NoiseAugmentation
from ldm.models.text.config import MissingConfig, TextConfig
from ldm.models.transformers.flux import FluxConfig
from ldm.models.unet import UNetConfig

VERSION = "0.30.0"  # of diffusers, whose format this is
SD, XL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
INPAINT, XL_INPAINT = "StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline"
PIX2PIX, XL_PIX2PIX = "StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline"
UPSCALE = "StableDiffusionUpscalePipeline"
LCM = "LatentConsistencyModelPipeline"
ONE = (
    SD, INPAINT, PIX2PIX, UPSCALE, "StableDiffusionImg2ImgPipeline", LCM, "LatentConsistencyModelImg2ImgPipeline",
)  # fmt: skip
TWO = (XL, XL_INPAINT, XL_PIX2PIX, "StableDiffusionXLImg2ImgPipeline")
"""Pipelines of U-Nets whose folders are read here, with one text encoder and with two."""
_CLIP = ("CLIPTextModel", "CLIPTextModelWithProjection")
TEXT_CLASSES = {"clip": _CLIP, "t5": ("T5EncoderModel",), "qwen": ("Qwen3Model", "Qwen3ForCausalLM")}
TOKENIZERS = {
    "clip": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "t5": ("T5Tokenizer", "T5TokenizerFast"),
    "qwen": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
}
NAMES = {"clip": "CLIP", "t5": "T5", "qwen": "Qwen3"}


PIPELINES = (*ONE, *TWO, *(name for layout in FILES.values() for name in layout.pipelines))


def kind_of(index: Mapping[str, Any]) -> str:
    """The kind of network of a folder: "unet", or a key of `FILES`; by the pipeline, or its network's class."""
    cls, part = index.get("_class_name"), index.get("transformer")
    network = part[1] if isinstance(part, list) and len(part) == 2 else None
    for kind, layout in FILES.items():
        if cls in layout.pipelines or (cls is None and network in layout.network):
            return kind
    return "unet"


def numbered(name: str, index: int) -> str:
    """ "text_encoder", "text_encoder_2" and so on."""
    return f"{name}_{index + 1}" if index else name


def pipeline_of(model: Opened) -> str:
    """The class of the pipeline that fits."""
    config = model.network_config
    if isinstance(config, UNetConfig):
        return _unet_pipeline(config, len(model.text) > 1, model.scheduler)
    files = FILES[config.kind]
    return files.pipelines[0] if files.pipeline is None else files.pipeline(config, tuple(t.config for t in model.text))


def _unet_pipeline(config: UNetConfig, two: bool, scheduler: Mapping[str, Any]) -> str:
    how = scheduler.get("_class_name", "DDIMScheduler"), scheduler.get("timestep_spacing")
    progressive = how == ("DDIMScheduler", "trailing")  # a student that is told its guidance and drawn by DDIM
    if config.time_cond_proj_dim is not None and not two and not progressive:
        return LCM
    if config.in_channels == 2 * config.out_channels + 1:
        return XL_INPAINT if two else INPAINT
    if config.in_channels == config.out_channels + 3 and config.num_class_embeds is not None and not two:
        return UPSCALE
    if config.in_channels == 2 * config.out_channels:
        return XL_PIX2PIX if two else PIX2PIX
    return XL if two else SD


def network_class(config: Any) -> str:
    """diffusers' class of a network."""
    return "UNet2DConditionModel" if isinstance(config, UNetConfig) else FILES[config.kind].network[0]


def projected(model: Opened, place: int) -> bool:
    """Whether a CLIP tower is stored with its projection: U-Nets take it of the second alone, FLUX.1 of none."""
    tower = model.text[place].config
    if isinstance(model.network_config, UNetConfig):
        return len(model.text) > 1 and place == len(model.text) - 1
    return isinstance(tower, TextConfig) and tower.projection is not None


def index_of(model: Opened, scheduler: str) -> dict[str, Any]:
    """`model_index.json`: the pipeline that fits the network, and the class of each part."""
    config, two = model.network_config, len(model.text) > 1
    unet = isinstance(config, UNetConfig)
    index: dict[str, Any] = {"_class_name": pipeline_of(model), "_diffusers_version": VERSION}
    upscales = index["_class_name"] == UPSCALE
    nothing = (*PICTURES, *["safety_checker"] * (not two)) if unet else FILES[config.kind].nothing
    nothing = ("feature_extractor", "safety_checker", "watermarker") if upscales else nothing
    index |= {key: [None, None] for key in nothing}
    index |= {component(config): ["diffusers", network_class(config)], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"scheduler": ["diffusers", scheduler]}
    for i in range(len(model.text) if unet else len(FILES[config.kind].text)):
        kind = model.text[i].config.kind if i < len(model.text) else "none"
        text, tokenizer = numbered("text_encoder", i), numbered("tokenizer", i)
        if kind == "none":
            index |= {text: [None, None], tokenizer: [None, None]}
            continue
        cls = TEXT_CLASSES[kind][projected(model, i) if kind == "clip" else 0]
        index |= {text: ["transformers", cls], tokenizer: ["transformers", TOKENIZERS[kind][0]]}
    if upscales:
        levels = (model.augmentation or NoiseAugmentation()).levels
        return index | {"low_res_scheduler": ["diffusers", "DDPMScheduler"], "max_noise_level": levels}
    if unet and two:
        index["force_zeros_for_empty_prompt"] = getattr(model.text[0].config, "zero_empty", False)
    elif unet:
        index["requires_safety_checker"] = False
    return index


def check_text(model: Opened) -> None:
    """Raise ValueError for text encoders that the family's folder cannot hold, naming them and what it holds."""
    config, given = model.network_config, [t.config.kind for t in model.text]
    if isinstance(config, UNetConfig):
        if wrong := sorted(set(given) - {"clip"}):
            raise ValueError(f"{model.where}: text encoder(s) {wrong}: a U-Net's folder holds CLIP towers alone")
        return
    layout = FILES[config.kind]
    fits = len(layout.needed * [0]) <= len(given) <= len(layout.text)
    fits = fits and all(g in (k, "none") for g, k in zip(given, layout.text, strict=False))
    if config.kind == "sd3" and fits:  # their pipeline puts zeros for a missing T5
        fits = given == ["clip"] or len(given) == 3
    if not fits or "none" in given[: layout.needed] or (config.kind == "sd3" and given[1:2] == ["none"]):
        raise ValueError(
            f"{model.where}: text encoders {given}: {layout.title} in diffusers' layout has {list(layout.text)}"
            + (", the last of which may be 'none', or one 'clip' alone" if config.kind == "sd3" else "")
        )
    for i, tower in enumerate(model.text):
        cfg = tower.config
        if isinstance(cfg, TextConfig) and (cfg.zero_empty or (isinstance(config, FluxConfig) and cfg.projection)):
            raise ValueError(
                f"{model.where}: {numbered('text_encoder', i)}: {'zero_empty' if cfg.zero_empty else 'projection'} "
                f"{cfg.zero_empty or cfg.projection!r} has no place in a folder of {layout.title}"
            )
        if isinstance(cfg, MissingConfig) and cfg.tokens != 256:
            raise ValueError(f"{model.where}: a missing T5 is 256 tokens in diffusers' layout, not {cfg.tokens}")
