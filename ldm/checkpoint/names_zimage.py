"""Z-Image's transformer in its authors' names, as ComfyUI's files have it, and its settings by their shapes."""

from __future__ import annotations

from ldm.checkpoint.lora_zimage import layers
from ldm.checkpoint.pairs import Pair, layer
from ldm.checkpoint.weights import Source
from ldm.models.transformers.presets import ZIMAGE
from ldm.models.transformers.zimage import ZImageConfig

MARK = "cap_pad_token"
"""A name that only this family has."""
UNUSED = "norm_final.weight"
"""A norm that some files hold and nothing uses."""
_PLAIN = ("attention.", "feed_forward.", "norm", "cap_embedder.0")
_TOKENS = ("x_pad_token", "cap_pad_token")


def pairs(config: ZImageConfig) -> list[Pair]:
    """All tensors of a network of these settings: the layers of the LoRA files' table, and the tokens of padding."""
    out = [Pair(name, (name,)) for name in _TOKENS]
    for name, found in layers(config).items():
        if config.qk_norm or not name.endswith(("q_norm", "k_norm")):
            out += layer(name, *found.parts, rows=found.rows, bias=not any(part in name for part in _PLAIN))
    return out


def settings(source: Source) -> ZImageConfig:
    """What the shapes of a file in these names tell; patches are of 2 x 2 pixels, a head as wide as the published."""
    width, head = source["x_pad_token"].shape[1], sum(ZIMAGE.axes_dims)
    counts = {
        stack: len({k.split(".")[1] for k in source if k.startswith(f"{stack}.")})
        for stack in ("layers", "noise_refiner")
    }
    return ZImageConfig(
        in_channels=source["x_embedder.weight"].shape[1] // 4,
        dim=width,
        n_layers=counts["layers"],
        n_refiner_layers=counts["noise_refiner"],
        n_heads=width // head,
        n_kv_heads=width // head,
        qk_norm="layers.0.attention.q_norm.weight" in source,
        cap_feat_dim=source["cap_embedder.1.weight"].shape[1],
        axes_dims=ZIMAGE.axes_dims,
        axes_lens=ZIMAGE.axes_lens,
    )
