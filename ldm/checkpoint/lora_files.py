"""LoRA files both ways: diffusers' and PEFT's `pytorch_lora_weights.safetensors`, and kohya's single file.

kohya names a layer `lora_unet_` or `lora_te_` and its name with underscores; for SDXL the U-Net's layers have CompVis'
names there and the towers are `lora_te1_` and `lora_te2_`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.adapters.lora import to_peft
from ldm.adapters.low_rank import Lora, LowRank
from ldm.adapters.sites import all_sites
from ldm.checkpoint.maps import unet_to_compvis
from ldm.models.text import TextTower
from ldm.models.unet import UNet, UNetConfig
from ldm.words import expanded

NAME = "pytorch_lora_weights.safetensors"
Format = Literal["diffusers", "kohya"]

_KINDS = {
    "lora_A": "down",
    "lora_B": "up",
    "lora.down": "down",
    "lora.up": "up",
    "lora_linear_layer.down": "down",
    "lora_linear_layer.up": "up",
    "lora_down": "down",
    "lora_up": "up",
    "lora_magnitude_vector": "magnitude",
    "dora_scale": "magnitude",
    "alpha": "alpha",
}
_ENDING = re.compile(
    r"\.(" + "|".join(re.escape(k) for k in sorted(_KINDS, key=len, reverse=True)) + r")(\.default)?(\.weight)?$"
)
_PROCESSOR = re.compile(r"\.processor\.(to_\w+)_lora\.(down|up)\.weight$")


def write_lora(
    path: Path,
    lora: Lora,
    unet: UNetConfig,
    *,
    form: Format = "diffusers",
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file; `unet` is the base model's config, since kohya's names depend on it."""
    notes = {"format": "pt", **(metadata or {})}
    if form == "diffusers":
        tensors = to_peft(lora)
    else:
        tensors = to_kohya(lora, unet)
        notes |= _kohya_notes(lora, unet)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().to("cpu", dtype).contiguous() for k, v in tensors.items()}, path, metadata=notes)


def read_lora(path: str | Path, unet: UNet, text: Sequence[TextTower]) -> Lora:
    """The corrections of a file of any of these forms, under this model's layer names.

    Raises ValueError for a file that is none of them, or with layers that this model does not have.
    """
    path = Path(expanded(str(path)))
    path = path / NAME if path.is_dir() else path
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(f"LoRA {str(path)!r}: no such .safetensors file, nor a folder that holds {NAME}")
    try:
        with safe_open(path, "pt") as handle:
            tensors = {k: handle.get_tensor(k) for k in handle.keys()}  # noqa: SIM118 (not a dict)
            notes = handle.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"LoRA {str(path)!r}: not a safetensors file: {error}") from error
    where = f"LoRA {str(path)!r}"
    names = _known_names(unet, text)
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        layer, kind = _split(key, where)
        if layer not in names:
            raise ValueError(f"{where}: {key!r} names no layer of this model; is it for another base model?")
        found.setdefault(names[layer], {})[kind] = value.float()
    return {name: _assemble(name, parts, _Scales(notes), where) for name, parts in found.items()}


def to_kohya(lora: Lora, unet: UNetConfig) -> dict[str, Tensor]:
    """Tensors under kohya's names, with alpha."""
    names = kohya_names(lora, unet)
    out = {}
    for name, low in lora.items():
        key = names[name]
        out[f"{key}.lora_down.weight"] = low.down
        out[f"{key}.lora_up.weight"] = low.up
        out[f"{key}.alpha"] = torch.tensor(low.alpha)
        if low.magnitude is not None:
            out[f"{key}.dora_scale"] = low.magnitude.view(-1, *[1] * (low.down.ndim - 1))
    return out


def kohya_names(sites: Sequence[str] | Mapping[str, Any], unet: UNetConfig) -> dict[str, str]:
    """Layer name -> kohya's."""
    wide = is_xl(unet)
    inner = [s.removeprefix("unet.") for s in sites if s.startswith("unet.")]
    compvis = _compvis(inner, unet) if wide else {n: n for n in inner}
    out = {}
    for site in sites:
        component, _, name = site.partition(".")
        if component == "unet":
            out[site] = "lora_unet_" + compvis[name].replace(".", "_")
        else:
            te = ("te2" if component == "text_encoder_2" else "te1") if wide else "te"
            out[site] = f"lora_{te}_" + name.replace(".", "_")
    return out


def is_xl(unet: UNetConfig) -> bool:
    """Whether this is an SDXL U-Net."""
    return unet.addition_embed_type == "text_time"


def _compvis(names: Sequence[str], config: UNetConfig) -> dict[str, str]:
    layers = list(config.per_level("layers_per_block"))
    attend_up = ["CrossAttn" in kind for kind in config.up_block_types]
    full = unet_to_compvis([f"{n}.weight" for n in names], layers, attend_up)
    return {k.removesuffix(".weight"): v.removesuffix(".weight") for k, v in full.items()}


def _known_names(unet: UNet, text: Sequence[TextTower]) -> dict[str, str]:
    """Every name that a file may give a layer -> ours."""
    sites = list(all_sites(unet, text))
    names = {s: s for s in sites} | {v: k for k, v in kohya_names(sites, unet.config).items()}
    for site in sites:
        component, _, name = site.partition(".")
        if component == "unet":
            names["lora_unet_" + name.replace(".", "_")] = site
            names[name] = site
        else:
            names[f"{component}.{name.removeprefix('text_model.')}"] = site
            if component == "text_encoder":
                names["lora_te_" + name.replace(".", "_")] = site
    return names


def _split(key: str, where: str) -> tuple[str, str]:
    """(layer name as in the file, what the tensor is)."""
    plain = key.removeprefix("base_model.model.")
    if match := _PROCESSOR.search(plain):
        layer = match[1] + (".0" if match[1] == "to_out" else "")
        return f"{plain[: match.start()]}.{layer}", match[2]
    if match := _ENDING.search(plain):
        return plain[: match.start()], _KINDS[match[1]]
    raise ValueError(f"{where}: {key!r} is no tensor of a LoRA")


class _Scales:
    """What a file's header says of alpha: diffusers writes PEFT's settings there as JSON."""

    def __init__(self, notes: Mapping[str, str]) -> None:
        try:
            self._settings: dict[str, Any] = json.loads(notes.get("lora_adapter_metadata", "{}"))
        except ValueError:
            self._settings = {}

    def alpha(self, site: str, rank: int) -> float:
        component, _, name = site.partition(".")
        get = lambda key, default: self._settings.get(f"{component}.{key}", default)  # noqa: E731
        alpha = get("lora_alpha", None)
        for pattern, value in (get("alpha_pattern", None) or {}).items():
            if re.search(rf"(^|\.){pattern}$", name):
                alpha = value
        if alpha is None:
            return float(rank)
        return float(alpha) * (math.sqrt(rank) if get("use_rslora", False) else 1.0)


def _assemble(name: str, parts: dict[str, Tensor], scales: _Scales, where: str) -> LowRank:
    if "down" not in parts or "up" not in parts:
        raise ValueError(f"{where}: {name} has {sorted(parts)}, and needs both down and up")
    down, up = parts["down"], parts["up"]
    if down.shape[0] != up.shape[1]:
        raise ValueError(f"{where}: {name} has ranks {down.shape[0]} and {up.shape[1]}")
    if name.endswith((".proj_in", ".proj_out")) and down.ndim != up.ndim:
        raise ValueError(f"{where}: {name} mixes a convolution and a linear layer")
    alpha = float(parts["alpha"]) if "alpha" in parts else scales.alpha(name, down.shape[0])
    magnitude = parts.get("magnitude")
    return LowRank(down, up, alpha, None if magnitude is None else magnitude.flatten())


def _kohya_notes(lora: Lora, unet: UNetConfig) -> dict[str, str]:
    """The header that kohya's tools and the web pages read."""
    lows = list(lora.values())
    ranks, alphas = {x.rank for x in lows}, {x.alpha for x in lows}
    wide = is_xl(unet)
    width = unet.per_level("cross_attention_dim")[0]
    base = "sdxl_base_v1-0" if wide else "sd_v2" if width == 1024 else "sd_v1"
    notes = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(max(alphas)) if len(alphas) == 1 else "Dynamic",
        "ss_base_model_version": base,
        "ss_v2": str(width == 1024 and not wide),
    }
    convolutions = [x for x in lows if x.down.ndim == 4 and x.down.shape[-1] > 1]
    if convolutions:
        arguments = {"conv_dim": str(convolutions[0].rank), "conv_alpha": str(convolutions[0].alpha)}
        notes["ss_network_args"] = json.dumps(arguments)
    return notes
