"""What the layers of each family of networks are called in LoRA files, and which family a file's names are of.

kohya names a layer `lora_unet_` or `lora_te_` and its name with underscores; for SDXL and the transformers the
network's layers have the authors' names there and the towers are `lora_te1_`, `lora_te2_`. OneTrainer writes
`lora_transformer_` or dots, ComfyUI `diffusion_model.` and `clip_l.`, LyCORIS `lycoris_`. Here all of them are compared
with underscores. A family is one table, the authors' names of its layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ldm.checkpoint.families import FILES
from ldm.checkpoint.lora_layers import Layer, Table, one
from ldm.checkpoint.lora_names import plain, split
from ldm.checkpoint.maps import unet_to_compvis
from ldm.models.families import family_of
from ldm.models.networks import AnyNetwork
from ldm.models.unet import UNetConfig

_STARTS = {
    "unet": ("", "unet_", "lora_unet_", "lycoris_", "lycoris_unet_", "diffusion_model_", "model_diffusion_model_"),
    "transformer": ("", "transformer_", "lora_unet_", "lora_transformer_", "unet_", "lycoris_", "lycoris_transformer_",
                    "lycoris_unet_", "diffusion_model_", "model_diffusion_model_"),
    "text_encoder": ("", "text_encoder_", "lora_te_", "lora_te1_", "lycoris_te_", "lycoris_te1_", "clip_l_", "clip_h_",
                     "lycoris_text_encoder_", "clip_l_transformer_", "clip_h_transformer_",
                     "text_encoders_clip_l_transformer_"),
    "text_encoder_2": ("text_encoder_2_", "lora_te2_", "lycoris_te2_", "lycoris_text_encoder_2_", "clip_g_",
                       "clip_g_transformer_", "text_encoders_clip_g_transformer_"),
}  # fmt: skip
_OF_T5 = [
    "", "t5xxl_", "t5xxl_transformer_", "text_encoders_t5xxl_", "text_encoders_t5xxl_transformer_",
    *(f"{start}{n}_" for start in ("lora_te", "lycoris_te") for n in ("", 1, 2, 3)),
    *(f"{start}text_encoder{n}_" for start in ("", "lycoris_") for n in ("", "_2", "_3")),
]  # fmt: skip
"""Of T5, whose layers have names of their own, tools count the place in other ways: kohya writes `lora_te3_` of FLUX.1
too, OneTrainer `lora_te2_`."""
_T5 = re.compile(r"(encoder_)?block_\d+_layer_\d+_|t5xxl|^lora_te3_|^text_encoder_3_")
_ANY_UNET = "Stable Diffusion 1, 2 or XL"
_MARKS = (
    (re.compile(r"(^|_)(input_blocks_\d|output_blocks_\d|middle_block_\d)"), "Stable Diffusion XL"),
    (re.compile(r"(^|_)(down_blocks|up_blocks)_\d|(^|_)mid_block_"), _ANY_UNET),
    *((files.marks, files.title) for files in FILES.values()),
    (re.compile(r"(^|_)transformer_blocks_\d+_img_m(lp|od)_"), "Qwen-Image"),
    (re.compile(r"(^|_)blocks_\d+_(self|cross)_attn_[qkvo]$"), "Wan"),
    (re.compile(r"(^|_)transformer_blocks_\d+_(attn2?|ff|ff_context|norm1|norm1_context)_"), "Stable Diffusion 3"),
)
"""Names of layers that tell a family, the first that fits; diffusers' names of joint blocks, SD3's and FLUX.1's, last.
"""
_STABLE = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}


@dataclass(frozen=True)
class Names:
    """The names of a family of networks: the authors' `table` of its layers, `header` of kohya's files.

    `other`: tables of further names; `also`: the authors' layers under other names. `header` is None where kohya's
    scripts know no such network.
    """

    table: Callable[[Any], Table]
    header: Callable[[Any], dict[str, str]] | None
    other: tuple[Callable[[Any], Table], ...] = ()
    also: Mapping[str, str] = field(default_factory=dict)


def is_xl(unet: Any) -> bool:
    """Whether this is an SDXL U-Net."""
    return isinstance(unet, UNetConfig) and unet.addition_embed_type == "text_time"


def _unet_header(unet: UNetConfig) -> dict[str, str]:
    second = not is_xl(unet) and unet.per_level("cross_attention_dim")[0] == 1024
    base = "sdxl_base_v1-0" if is_xl(unet) else "sd_v2" if second else "sd_v1"
    return {"ss_network_module": "networks.lora", "ss_base_model_version": base, "ss_v2": str(second)}


_UNET = Names(lambda config: {}, _unet_header)


def names_of(config: object) -> Names:
    """The names of a network of some settings. Raises ValueError for one that has no LoRA files."""
    if isinstance(config, UNetConfig):
        return _UNET
    for files in FILES.values():
        if isinstance(config, files.config):
            return Names(files.layers, files.header, files.more, files.also)
    known = ["UNetConfig", *(files.config.__name__ for files in FILES.values())]
    raise ValueError(f"{type(config).__name__}: LoRA files are known for {known}")


def known_names(sites: Iterable[str], config: object) -> dict[str, Layer]:
    """Every name that a file may give a layer, dots as underscores -> what it is here, by the names of `sites`."""
    names = [s for s in sites if not s.endswith(".bias")]
    own, found = set(names), {}
    for site in names:
        component, _, name = site.partition(".")
        starts = _OF_T5 if is_t5(site) else _STARTS[component]
        if component in ("unet", "transformer"):
            aliases = {name, name.removesuffix(".0") if name.endswith("to_out.0") else name}
        else:
            aliases = {name, name.removeprefix("encoder." if is_t5(site) else "text_model.")}
        found |= {start + plain(n): one(site) for start in starts for n in aliases}
    component = next((s.partition(".")[0] for s in names if s.startswith(("unet.", "transformer."))), "unet")
    for name, layer in _tables(names, config):
        layer = replace(layer, parts=tuple(f"{component}.{p}" for p in layer.parts))
        if own.issuperset(layer.parts):
            found |= {start + plain(name): layer for start in _STARTS[component]}
    return found


def _tables(sites: Sequence[str], config: object) -> Iterable[tuple[str, Layer]]:
    """All names of the authors' layers, and those of the parts of a layer that is several (OneTrainer's `qkv.0`)."""
    ours = names_of(config)
    table = _table(sites, config)
    yield from table.items()
    for other, name in ours.also.items():
        yield other, table[name]
    for name, layer in table.items():
        if len(layer.parts) > 1:
            yield from ((f"{name}.{i}", one(part)) for i, part in enumerate(layer.parts))
    for more in ours.other:
        yield from more(config).items()


def _table(sites: Iterable[str], config: object) -> Table:
    if isinstance(config, UNetConfig):
        return {theirs: one(ours) for ours, theirs in _compvis(_inner(sites), config).items()}
    return names_of(config).table(config)


def kohya_layers(sites: Sequence[str] | Mapping[str, Any], config: object) -> dict[str, Layer]:
    """kohya's names of the layers that these sites are part of, in their order -> all sites of each."""
    network = {f"lora_unet_{plain(n)}": layer for n, layer in _kohya_table(sites, config).items()}
    of_site = {site: key for key, layer in network.items() for site in layer.parts}
    several = is_xl(config) or not isinstance(config, UNetConfig)
    found: dict[str, Layer] = {}
    for site in sites:
        component, _, name = site.partition(".")
        if site in of_site:
            found[of_site[site]] = network[of_site[site]]
        elif component.startswith("text_encoder"):
            place = ("te2" if component == "text_encoder_2" else "te1") if several else "te"
            place = "te3" if is_t5(site) else place
            found[f"lora_{place}_{plain(name)}"] = one(site)
    return found


def _kohya_table(sites: Iterable[str], config: object) -> Table:
    """The network's layers as kohya names them, parts by the names of `sites`."""
    if isinstance(config, UNetConfig):
        inner = _inner(sites)
        table = {t: one(o) for o, t in _compvis(inner, config).items()} if is_xl(config) else {n: one(n) for n in inner}
        component = "unet"
    else:
        table, component = names_of(config).table(config), "transformer"
    return {n: replace(x, parts=tuple(f"{component}.{p}" for p in x.parts)) for n, x in table.items()}


def kohya_names(sites: Sequence[str] | Mapping[str, Any], config: object) -> dict[str, str]:
    """Layer name -> kohya's; several of ours may be one of kohya's."""
    here = set(sites)
    return {s: key for key, layer in kohya_layers(sites, config).items() for s in layer.parts if s in here}


def kohyas_own(site: str, config: object = None) -> bool:
    """Whether kohya's form has this layer: SD3's and FLUX.1's transformers, T5 and CLIP towers whole, of a U-Net what
    its scripts correct, which are transformers, resnets and resamplers. None is a network that is not known.
    """
    if site.startswith("transformer."):
        known = config is None or names_of(config).header is not None
        return known and not re.search(r"\.(attn1|adaln_single|caption_projection)\.|\.bias$", site)
    if is_t5(site):
        return config is None or names_of(config).header is not None
    if not site.startswith("unet."):
        return ".encoder.layers." in site and not site.endswith((".bias", ".layer_norm1", ".layer_norm2"))
    return bool(re.search(r"\.(attentions|resnets|downsamplers|upsamplers)\.\d", site)) and not re.search(
        r"\.(norm\d?|bias)$", site
    )


def foreign(widths: Mapping[str, int], config: AnyNetwork) -> str:
    """One sentence where a file's names are another family's than the network's, else nothing.

    `widths`: names of tensors and the length of their last axis.
    """
    own, told = family_of(config).title, _told(widths)
    if not told or own.startswith(told) or (told == _ANY_UNET and isinstance(config, UNetConfig)):
        return ""
    return f"its names are those of {told}, the model is {own}"


def is_t5(site: str) -> bool:
    """Whether a site is a layer of a T5 encoder."""
    return ".encoder.block." in site


def of_t5(keys: Iterable[str]) -> bool:
    """Whether one of these tensors corrects a T5 encoder."""
    return any(_T5.search(plain(k)) for k in keys)


def _told(widths: Mapping[str, int]) -> str:
    every = [(named, n) for key, n in widths.items() if (named := split(key)) is not None]
    layers = {plain(named.layer): 0 for named, _ in every} | {plain(x.layer): n for x, n in every if x.part == "down"}
    for mark, title in _MARKS:
        hits = [name for name in layers if mark.search(name)]
        if not hits:
            continue
        if title == "Stable Diffusion 3" and any(
            layers[n] == 3072 and re.search(r"_attn_(to|add)_[qkv]", n) for n in hits
        ):
            return "FLUX.1"
        if title == _ANY_UNET:
            cross = {layers[n] for n in hits if n.endswith(("attn2_to_k", "attn2_to_v"))}
            return next((name for width, name in _STABLE.items() if width in cross), title)
        return title
    return ""


def _inner(sites: Iterable[str]) -> list[str]:
    return [s.removeprefix("unet.") for s in sites if s.startswith("unet.")]


def _compvis(names: Sequence[str], config: UNetConfig) -> dict[str, str]:
    counts = list(config.per_level("layers_per_block"))
    attend_up = ["CrossAttn" in kind for kind in config.up_block_types]
    full = unet_to_compvis([f"{n}.weight" for n in names], counts, attend_up)
    return {k.removesuffix(".weight"): v.removesuffix(".weight") for k, v in full.items()}
