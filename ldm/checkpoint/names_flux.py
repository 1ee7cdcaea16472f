"""FLUX.1's transformer in its authors' names (double_blocks, single_blocks ...), and its settings by their shapes."""

from __future__ import annotations

from ldm.checkpoint.pairs import Pair, layer
from ldm.checkpoint.weights import Source
from ldm.models.transformers.flux import FluxConfig

MARK = "double_blocks.0.img_attn.norm.key_norm.scale"
"""A name that only this family and its relatives have."""
_AXES = {128: (16, 56, 56)}
"""Channels of a head -> how its rotary positions are divided, which no tensor tells."""


def pairs(config: FluxConfig) -> list[Pair]:
    """All tensors of a network of these settings."""
    out = [
        *layer("img_in", "x_embedder"),
        *layer("txt_in", "context_embedder"),
        *layer("final_layer.linear", "proj_out"),
        *layer("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True),
    ]
    told = [("time_in", "timestep_embedder"), ("vector_in", "text_embedder")]
    for other, native in told + [("guidance_in", "guidance_embedder")] * config.guidance_embeds:
        out += layer(f"{other}.in_layer", f"time_text_embed.{native}.linear_1")
        out += layer(f"{other}.out_layer", f"time_text_embed.{native}.linear_2")
    for i in range(config.num_layers):
        out += _double(config.width, f"double_blocks.{i}", f"transformer_blocks.{i}")
    for i in range(config.num_single_layers):
        out += _single(config.width, f"single_blocks.{i}", f"single_transformer_blocks.{i}")
    return out


def _double(width: int, other: str, own: str) -> list[Pair]:
    out: list[Pair] = []
    for kind, q, norm, proj, context in (
        ("img", "to_{}", "norm_", "to_out.0", ""),
        ("txt", "add_{}_proj", "norm_added_", "to_add_out", "_context"),
    ):
        out += layer(f"{other}.{kind}_mod.lin", f"{own}.norm1{context}.linear")
        out += layer(f"{other}.{kind}_attn.qkv", *(f"{own}.attn.{q.format(x)}" for x in "qkv"), rows=(width,) * 3)
        out += layer(f"{other}.{kind}_attn.proj", f"{own}.attn.{proj}")
        out += layer(f"{other}.{kind}_mlp.0", f"{own}.ff{context}.net.0.proj")
        out += layer(f"{other}.{kind}_mlp.2", f"{own}.ff{context}.net.2")
        out += _norms(f"{other}.{kind}_attn.norm", f"{own}.attn.{norm}")
    return out


def _single(width: int, other: str, own: str) -> list[Pair]:
    into = (*(f"{own}.attn.to_{x}" for x in "qkv"), f"{own}.proj_mlp")
    return [
        *layer(f"{other}.linear1", *into, rows=(width, width, width, 4 * width)),
        *layer(f"{other}.linear2", f"{own}.proj_out"),
        *layer(f"{other}.modulation.lin", f"{own}.norm.linear"),
        *_norms(f"{other}.norm", f"{own}.attn.norm_"),
    ]


def _norms(other: str, own: str) -> list[Pair]:
    return [Pair(f"{other}.{x}_norm.scale", (f"{own}{x[0]}.weight",)) for x in ("query", "key")]


def settings(source: Source) -> FluxConfig:
    """What the shapes of a file in these names tell. Raises ValueError for heads whose positions they do not tell."""
    width, channels = source["img_in.weight"].shape
    head, out = source[MARK].shape[0], source["final_layer.linear.weight"].shape[0]
    if head not in _AXES:
        raise ValueError(f"heads of {head} channels: nothing in the file tells how positions turn them")
    return FluxConfig(
        in_channels=channels,
        out_channels=None if out == channels else out,
        num_layers=_count(source, "double_blocks."),
        num_single_layers=_count(source, "single_blocks."),
        attention_head_dim=head,
        num_attention_heads=width // head,
        joint_attention_dim=source["txt_in.weight"].shape[1],
        pooled_projection_dim=source["vector_in.in_layer.weight"].shape[1],
        guidance_embeds="guidance_in.in_layer.weight" in source,
        axes_dims_rope=_AXES[head],
    )


def _count(source: Source, start: str) -> int:
    return len({k.split(".")[1] for k in source if k.startswith(start)})
