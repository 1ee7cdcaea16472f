"""PixArt's transformer in its authors' names (blocks, t_block, y_embedder ...), and its settings by their shapes."""

from __future__ import annotations

import logging
import math

from ldm.checkpoint.pairs import Pair, layer
from ldm.checkpoint.weights import Source
from ldm.models.transformers.pixart import PixArtConfig

log = logging.getLogger(__name__)
MARK = "blocks.0.cross_attn.kv_linear.weight"
"""A name that this family has, and SANA."""
TABLE, NULL = "pos_embed", "y_embedder.y_embedding"
"""What such files hold beside the weights: the table of positions, which is computed here, and T5's states of the empty
prompt, which T5 gives."""
_HEAD = 72


def pairs(config: PixArtConfig) -> list[Pair]:
    """All tensors of a network of these settings."""
    out = [
        *layer("x_embedder.proj", "pos_embed.proj"),
        *layer("t_block.1", "adaln_single.linear"),
        *layer("final_layer.linear", "proj_out"),
        Pair("final_layer.scale_shift_table", ("scale_shift_table",)),
    ]
    embedders = [("t_embedder", "timestep_embedder")]
    if config.micro:
        embedders += [("csize_embedder", "resolution_embedder"), ("ar_embedder", "aspect_ratio_embedder")]
    for other, native in embedders:
        out += layer(f"{other}.mlp.0", f"adaln_single.emb.{native}.linear_1")
        out += layer(f"{other}.mlp.2", f"adaln_single.emb.{native}.linear_2")
    if config.caption_channels is not None:
        out += layer("y_embedder.y_proj.fc1", "caption_projection.linear_1")
        out += layer("y_embedder.y_proj.fc2", "caption_projection.linear_2")
    for i in range(config.num_layers):
        out += _block(config, f"blocks.{i}", f"transformer_blocks.{i}")
    return out


def _block(config: PixArtConfig, other: str, own: str) -> list[Pair]:
    width, bias = config.width, config.attention_bias
    return [
        Pair(f"{other}.scale_shift_table", (f"{own}.scale_shift_table",)),
        *layer(f"{other}.attn.qkv", *(f"{own}.attn1.to_{x}" for x in "qkv"), rows=(width,) * 3, bias=bias),
        *layer(f"{other}.attn.proj", f"{own}.attn1.to_out.0"),
        *layer(f"{other}.cross_attn.q_linear", f"{own}.attn2.to_q", bias=bias),
        *layer(f"{other}.cross_attn.kv_linear", *(f"{own}.attn2.to_{x}" for x in "kv"), rows=(width,) * 2, bias=bias),
        *layer(f"{other}.cross_attn.proj", f"{own}.attn2.to_out.0"),
        *layer(f"{other}.mlp.fc1", f"{own}.ff.net.0.proj"),
        *layer(f"{other}.mlp.fc2", f"{own}.ff.net.2"),
    ]


def settings(source: Source, where: str) -> PixArtConfig:
    """What the shapes of a file in these names tell; 1024 pixels, said in the log, where the table of positions lacks.

    PixArt-alpha, whose captions have 120 tokens, does not squeeze positions under 1024 pixels; Sigma stretches them.
    """
    width, channels, patch, _ = source["x_embedder.proj.weight"].shape
    table, null = source.get(TABLE), source.get(NULL)
    if table is None:
        log.warning("%s: nothing tells the size of its pictures; 1024 x 1024 is taken", where)
    side = 128 if table is None else patch * math.isqrt(table.shape[-2])
    micro = "csize_embedder.mlp.0.weight" in source
    alpha = micro or (null is not None and null.shape[0] == 120)
    return PixArtConfig(
        num_attention_heads=width // _HEAD if width % _HEAD == 0 else 16,
        attention_head_dim=_HEAD if width % _HEAD == 0 else width // 16,
        in_channels=channels,
        out_channels=source["final_layer.linear.weight"].shape[0] // patch**2,
        num_layers=len({k.split(".")[1] for k in source if k.startswith("blocks.")}),
        cross_attention_dim=width,
        sample_size=side,
        patch_size=patch,
        interpolation_scale=None if alpha else side / 64,
        use_additional_conditions=micro,
        caption_channels=source["y_embedder.y_proj.fc1.weight"].shape[1],
    )
