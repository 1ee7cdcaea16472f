"""What the tensors of a LoRA file are called: the layer and the tensor's part, in the forms of many tools.

kohya names a layer `lora_unet_` or `lora_te_` and its name with underscores; for SDXL the U-Net's layers have CompVis'
names there and the towers are `lora_te1_` and `lora_te2_`. OneTrainer writes dots instead, ComfyUI `diffusion_model.`
and `clip_l.`, PEFT `base_model.model.`, LyCORIS `lycoris_`. Here all of them are compared with underscores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldm.checkpoint.maps import unet_to_compvis
from ldm.models.unet import UNetConfig

_UNET = ("", "unet_", "lora_unet_", "lycoris_", "lycoris_unet_", "diffusion_model_", "model_diffusion_model_")
_TOWERS = (
    ("", "text_encoder_", "lora_te_", "lora_te1_", "lycoris_te_", "lycoris_text_encoder_", "clip_l_", "clip_h_",
     "clip_l_transformer_", "clip_h_transformer_", "text_encoders_clip_l_transformer_"),
    ("text_encoder_2_", "lora_te2_", "lycoris_te2_", "lycoris_text_encoder_2_", "clip_g_", "clip_g_transformer_",
     "text_encoders_clip_g_transformer_"),
)  # fmt: skip
_PARTS = {
    "lora_A": "down",
    "lora_B": "up",
    "lora.down": "down",
    "lora.up": "up",
    "lora_linear_layer.down": "down",
    "lora_linear_layer.up": "up",
    "lora_down": "down",
    "lora_up": "up",
    "lora_mid": "mid",
    "lora_magnitude_vector": "magnitude",
    "dora_scale": "dora_scale",
    "alpha": "alpha",
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "w_norm",
    "b_norm": "b_norm",
    **{k: k for k in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{k: k for k in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
}
_ENDING = re.compile(
    r"\.(" + "|".join(re.escape(k) for k in sorted(_PARTS, key=len, reverse=True)) + r")"
    r"(?:\.(?!weight$|bias$)([^.]+))?(\.weight|\.bias)?$"
)
_PROCESSOR = re.compile(r"(?:\.processor)?\.(to_\w+)_lora\.(down\.weight|up\.weight|alpha)$")
_IN_TOWERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True)
class Named:
    """One tensor's name: its layer as the file has it, its part, and the adapter's name where PEFT wrote one."""

    layer: str
    part: str
    adapter: str = ""


def split(key: str) -> Named | None:
    """What a tensor's name says; None where it is no part of a correction that is known here."""
    plain = re.sub(r"(^|\.)_orig_mod\.", r"\1", key)
    plain = plain.removeprefix("base_model.model.").removeprefix("module.")
    if match := _PROCESSOR.search(plain):
        before, name = plain[: match.start()], match[1]
        if before.endswith("self_attn"):
            name = _IN_TOWERS.get(name, name)
        layer = f"{before}.{name}" + (".0" if name == "to_out" else "")
        return Named(layer, {"down.weight": "down", "up.weight": "up"}.get(match[2], match[2]))
    if match := _ENDING.search(plain):
        part = _PARTS[match[1]]
        if match[3] == ".bias":
            if part != "up":
                return None
            part = "up_bias"
        return Named(plain[: match.start()], part, match[2] or "")
    return None


def known_names(sites: Iterable[str], unet: UNetConfig) -> dict[str, str]:
    """Every name that a file may give a layer, dots as underscores -> ours."""
    sites = [s for s in sites if not s.endswith(".bias")]
    inner = [s.removeprefix("unet.") for s in sites if s.startswith("unet.")]
    compvis = _compvis(inner, unet)
    found: dict[str, str] = {}
    for site in sites:
        component, _, name = site.partition(".")
        if component == "unet":
            names, starts = {name, compvis[name]}, _UNET
        else:
            names, starts = {name, name.removeprefix("text_model.")}, _TOWERS[component == "text_encoder_2"]
        found |= {start + plain(n): site for start in starts for n in names}
    return found


def plain(layer: str) -> str:
    """A layer's name as `known_names` has it."""
    return layer.replace(".", "_")


def kohya_names(sites: Sequence[str] | Mapping[str, Any], unet: UNetConfig) -> dict[str, str]:
    """Layer name -> kohya's."""
    wide = is_xl(unet)
    inner = [s.removeprefix("unet.") for s in sites if s.startswith("unet.")]
    compvis = _compvis(inner, unet) if wide else {n: n for n in inner}
    out = {}
    for site in sites:
        component, _, name = site.partition(".")
        if component == "unet":
            out[site] = "lora_unet_" + plain(compvis[name])
        else:
            te = ("te2" if component == "text_encoder_2" else "te1") if wide else "te"
            out[site] = f"lora_{te}_" + plain(name)
    return out


def kohyas_own(site: str) -> bool:
    """Whether kohya's scripts correct this layer: those of transformers, resnets and resamplers, and the towers'."""
    if not site.startswith("unet."):
        return ".encoder.layers." in site and not site.endswith((".bias", ".layer_norm1", ".layer_norm2"))
    return bool(re.search(r"\.(attentions|resnets|downsamplers|upsamplers)\.\d", site)) and not re.search(
        r"\.(norm\d?|bias)$", site
    )


def is_xl(unet: UNetConfig) -> bool:
    """Whether this is an SDXL U-Net."""
    return unet.addition_embed_type == "text_time"


def _compvis(names: Sequence[str], config: UNetConfig) -> dict[str, str]:
    layers = list(config.per_level("layers_per_block"))
    attend_up = ["CrossAttn" in kind for kind in config.up_block_types]
    full = unet_to_compvis([f"{n}.weight" for n in names], layers, attend_up)
    return {k.removesuffix(".weight"): v.removesuffix(".weight") for k, v in full.items()}
