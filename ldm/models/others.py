"""The forms in which others write settings of networks and autoencoders, turned into ours; the meaning stays strict.

null is the default of a key, as old files and diffusers' own have it; keys that say where a file comes from, or how its
weights were averaged, change nothing and are left out. A value that would change the result is left for the config to
refuse by name.
"""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger(__name__)
ORIGIN = ("architectures", "model_type", "name_or_path", "torch_dtype", "dtype", "transformers_version", "library_name")
"""Where a file comes from, and the type in which it was stored."""
AVERAGE = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
"""What diffusers' `EMAModel` writes beside the settings of a model that it averaged."""


_EARLIEST = {
    "image_size": "sample_size",
    "num_res_blocks": "layers_per_block",
    "block_channels": "block_out_channels",
    "downscale_freq_shift": "freq_shift",
    "resnet_num_groups": "norm_num_groups",
    "resnet_act_fn": "act_fn",
    "resnet_eps": "norm_eps",
    "num_head_channels": "attention_head_dim",
}
"""Names of diffusers before 0.2, and today's."""


def plain(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Without nulls and keys that change nothing, a square `sample_size` as one number, SiLU by its one name."""
    if told := sorted(set(data) & {*ORIGIN, *AVERAGE}):
        log.info("%s: these keys change nothing: %s", where, ", ".join(told))
    data = {_EARLIEST.get(k, k): v for k, v in data.items() if k not in told and v is not None}
    if _alike(data.get("sample_size")):
        data["sample_size"] = data["sample_size"][0]
    if data.get("act_fn") == "swish":
        data["act_fn"] = "silu"
    return data


def unet(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Of diffusers' UNet2DConditionModel; values that ask for what is so anyway are left out."""
    data = plain(data, where)
    for key in ("down_block_types", "up_block_types"):
        if isinstance(types := data.get(key), (list, tuple)):
            data[key] = [t.removeprefix("UNetRes") if isinstance(t, str) else t for t in types]
    if _alike(data.get("only_cross_attention")):
        data["only_cross_attention"] = data["only_cross_attention"][0]
    depth, back = data.get("transformer_layers_per_block"), data.get("reverse_transformer_layers_per_block")
    neutral = {
        "mid_block_only_cross_attention": data.get("mid_block_only_cross_attention") is False,
        "addition_embed_type_num_heads": data.get("addition_embed_type") != "text",
        "reverse_transformer_layers_per_block": isinstance(depth, list) and back == depth[::-1],
    }
    return {k: v for k, v in data.items() if not neutral.get(k)}


def autoencoder(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Of diffusers' AutoencoderKL; a mean of 0 and a deviation of 1 for every channel are none."""
    data = plain(data, where)
    neutral = [k for k, v in (("latents_mean", 0), ("latents_std", 1)) if _alike(data.get(k)) and data[k][0] == v]
    return {k: v for k, v in data.items() if k not in neutral}


def transformer(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Of diffusers' transformers; null is not always the default of a key there, and stays."""
    if told := sorted(set(data) & {*ORIGIN, *AVERAGE}):
        log.info("%s: these keys change nothing: %s", where, ", ".join(told))
    data = {k: v for k, v in data.items() if k not in told and k != "_class_name"}
    if _alike(data.get("sample_size")):
        data["sample_size"] = data["sample_size"][0]
    return data


_PIXART = {
    "double_self_attention": False,
    "only_cross_attention": False,
    "num_vector_embeds": None,
    "use_linear_projection": False,
}
"""Keys of diffusers' Transformer2DModel, as PixArt was published at first, with the one value that changes nothing."""


def pixart(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Of diffusers' PixArtTransformer2DModel, or of Transformer2DModel, whose `norm_type` makes it a PixArt."""
    if data.get("_class_name") == "Transformer2DModel" and data.get("norm_type") != "ada_norm_single":
        raise ValueError(f"{where}: norm_type {data.get('norm_type')!r} is not 'ada_norm_single', which PixArt has")
    data = transformer(data, where)
    if data.get("dropout") == 0:
        data["dropout"] = 0.0
    return {k: v for k, v in data.items() if k not in _PIXART or v != _PIXART[k]}


def zimage(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Of diffusers' ZImageTransformer2DModel; copies of the published file say the number of heads twice."""
    data = transformer(data, where)
    return {k: v for k, v in data.items() if k != "nheads" or v != data.get("n_heads")}


def _alike(value: Any) -> bool:
    """A list of equal values, one for each level, channel or side."""
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(v == value[0] for v in value)
