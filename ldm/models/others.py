"""The forms in which others write the settings of U-Nets and autoencoders, turned into ours; the meaning stays strict.

null is the default of a key, as old files and diffusers' own have it; keys that say where a file comes from, or how its
weights were averaged, change nothing and are left out. A value that would change the result is left for the config to
refuse by name.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

log = logging.getLogger(__name__)
ORIGIN = ("architectures", "model_type", "name_or_path", "torch_dtype", "dtype", "transformers_version", "library_name")
"""Where a file comes from, and the type in which it was stored."""
AVERAGE = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
"""What diffusers' `EMAModel` writes beside the settings of a model that it averaged."""


def plain(data: dict[str, Any], where: str, meant: Collection[str] = ()) -> dict[str, Any]:
    """Without keys that change nothing and without nulls, except for the keys whose null is `meant`."""
    if told := sorted(set(data) & {*ORIGIN, *AVERAGE}):
        log.info("%s: these keys change nothing: %s", where, ", ".join(told))
    return {k: v for k, v in data.items() if k not in told and (v is not None or k in meant)}


def unet(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Of diffusers' UNet2DConditionModel; a null middle block or group count would mean none."""
    data = _square(plain(data, where, ("mid_block_type", "norm_num_groups")))
    only = data.get("only_cross_attention")
    return data | {"only_cross_attention": only[0]} if _alike(only) else data


def autoencoder(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Of diffusers' AutoencoderKL; a mean of 0 and a deviation of 1 for every channel are none."""
    data = _square(plain(data, where))
    neutral = [k for k, v in (("latents_mean", 0), ("latents_std", 1)) if _alike(data.get(k)) and data[k][0] == v]
    return {k: v for k, v in data.items() if k not in neutral}


def _alike(value: Any) -> bool:
    """A list of equal values, one for each level or channel."""
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(v == value[0] for v in value)


def _square(data: dict[str, Any]) -> dict[str, Any]:
    """A square `sample_size` as one number."""
    size = data.get("sample_size")
    return data | {"sample_size": size[0]} if isinstance(size, (list, tuple)) and _alike(size) else data
