"""SD3 and SD3.5's transformer in its authors' names (joint_blocks ...), and its settings as their shapes tell them."""

from __future__ import annotations

import math

from ldm.checkpoint.pairs import Pair, layer
from ldm.checkpoint.weights import Source
from ldm.models.transformers.sd3 import SD3Config

MARK = "joint_blocks.0.context_block.attn.qkv.weight"
"""A name that only this family has."""


def pairs(config: SD3Config) -> list[Pair]:
    """All tensors of a network of these settings."""
    out = [
        Pair("pos_embed", ("pos_embed.pos_embed",)),
        *layer("x_embedder.proj", "pos_embed.proj"),
        *layer("context_embedder", "context_embedder"),
        *layer("final_layer.linear", "proj_out"),
        *layer("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True),
    ]
    for other, native in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
        out += layer(f"{other}.mlp.0", f"time_text_embed.{native}.linear_1")
        out += layer(f"{other}.mlp.2", f"time_text_embed.{native}.linear_2")
    for i in range(config.num_layers):
        out += _block(config, i)
    return out


def _block(config: SD3Config, i: int) -> list[Pair]:
    image, text, own = f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block", f"transformer_blocks.{i}"
    rows, last = (config.width,) * 3, i == config.num_layers - 1
    out = [
        *layer(f"{image}.attn.qkv", *(f"{own}.attn.to_{x}" for x in "qkv"), rows=rows),
        *layer(f"{text}.attn.qkv", *(f"{own}.attn.add_{x}_proj" for x in "qkv"), rows=rows),
        *layer(f"{image}.attn.proj", f"{own}.attn.to_out.0"),
        *layer(f"{image}.adaLN_modulation.1", f"{own}.norm1.linear"),
        *layer(f"{text}.adaLN_modulation.1", f"{own}.norm1_context.linear", swapped=last),
        *layer(f"{image}.mlp.fc1", f"{own}.ff.net.0.proj"),
        *layer(f"{image}.mlp.fc2", f"{own}.ff.net.2"),
    ]
    if not last:
        out += layer(f"{text}.attn.proj", f"{own}.attn.to_add_out")
        out += layer(f"{text}.mlp.fc1", f"{own}.ff_context.net.0.proj")
        out += layer(f"{text}.mlp.fc2", f"{own}.ff_context.net.2")
    if dual := i in config.dual_attention_layers:
        out += layer(f"{image}.attn2.qkv", *(f"{own}.attn2.to_{x}" for x in "qkv"), rows=rows)
        out += layer(f"{image}.attn2.proj", f"{own}.attn2.to_out.0")
    if config.qk_norm is not None:
        norms = [(f"{image}.attn", f"{own}.attn.norm_"), (f"{text}.attn", f"{own}.attn.norm_added_")]
        for other, native in norms + [(f"{image}.attn2", f"{own}.attn2.norm_")] * dual:
            out += [Pair(f"{other}.ln_{x}.weight", (f"{native}{x}.weight",)) for x in "qk"]
    return out


def settings(source: Source) -> SD3Config:
    """What the shapes of a file in these names tell; its pictures are taken to be of 1024 pixels."""
    width, channels, patch, _ = source["x_embedder.proj.weight"].shape
    blocks = {int(k.split(".")[1]) for k in source if k.startswith("joint_blocks.")}
    norm = source.get("joint_blocks.0.x_block.attn.ln_q.weight")
    head = 64 if norm is None else norm.shape[0]
    return SD3Config(
        patch_size=patch,
        in_channels=channels,
        out_channels=source["final_layer.linear.weight"].shape[0] // patch**2,
        num_layers=len(blocks),
        attention_head_dim=head,
        num_attention_heads=width // head,
        joint_attention_dim=source["context_embedder.weight"].shape[1],
        caption_projection_dim=width,
        pooled_projection_dim=source["y_embedder.mlp.0.weight"].shape[1],
        pos_embed_max_size=math.isqrt(source["pos_embed"].shape[1]),
        dual_attention_layers=tuple(i for i in sorted(blocks) if f"joint_blocks.{i}.x_block.attn2.qkv.bias" in source),
        qk_norm=None if norm is None else "rms_norm",
    )
