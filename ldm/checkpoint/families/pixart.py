"""PixArt's files: its authors' names (blocks, t_block, y_embedder ...), OneTrainer's and ComfyUI's extension's too."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import replace
from typing import Any

from ldm.checkpoint.families.base import Files
from ldm.checkpoint.lora_layers import Layer, Table, several, under
from ldm.checkpoint.pairs import Pair, layer
from ldm.checkpoint.weights import Source
from ldm.models import others, presets
from ldm.models.text.config import AnyText, T5Config
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


_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "final_layer.linear": "proj_out",
}
_MICRO = {
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
}


def layers(config: PixArtConfig) -> Table:
    """Every layer with weights."""
    width = config.width
    table = under("", "", _TOP | (_MICRO if config.micro else {}))
    block: dict[str, str | Layer] = {
        "attn.qkv": several("attn1.", ("to_q", "to_k", "to_v"), [width] * 3),
        "attn.proj": "attn1.to_out.0",
        "cross_attn.q_linear": "attn2.to_q",
        "cross_attn.kv_linear": several("attn2.", ("to_k", "to_v"), [width] * 2),
        "cross_attn.proj": "attn2.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
    }
    for i in range(config.num_layers):
        table |= under(f"blocks.{i}.", f"transformer_blocks.{i}.", block)
    return table


def alpha(config: PixArtConfig, text: tuple[AnyText, ...]) -> bool:
    """Whether a model is of the first generation, whose captions have 120 tokens."""
    return config.micro or any(isinstance(t, T5Config) and t.max_length <= 120 for t in text)


def first(config: PixArtConfig) -> bool:
    """Whether `settings` took a file for one of the first generation."""
    return config.micro or config.interpolation_scale is None


def texts(config: PixArtConfig, pipeline: str | None) -> tuple[AnyText, ...]:
    """T5, of fewer tokens in the first generation."""
    (t5,) = presets.TEXTS["pixart"]
    assert isinstance(t5, T5Config)
    return (replace(t5, max_length=120) if pipeline == ALPHA or config.micro else t5,)


def scheduler(config: PixArtConfig) -> dict[str, Any]:
    """That of both generations."""
    return {
        "_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "beta_end": 0.02,
        "beta_schedule": "linear", "beta_start": 0.0001, "num_train_timesteps": 1000,
        "prediction_type": "epsilon", "solver_order": 2,
    }  # fmt: skip


ALPHA, SIGMA = "PixArtAlphaPipeline", "PixArtSigmaPipeline"
FILES = Files(
    title="PixArt",
    config=PixArtConfig,
    pipelines=(SIGMA, ALPHA),
    pipeline=lambda config, text: ALPHA if alpha(config, text) else SIGMA,
    network=("PixArtTransformer2DModel", "Transformer2DModel"),
    forms=others.pixart,
    text=("t5",),
    needed=1,
    texts=texts,
    mark=MARK,
    pairs=pairs,
    settings=settings,
    unused=(TABLE, NULL),
    encoders=("t5xxl",),
    autoencoder=lambda config: "kl_f8" if first(config) else "kl_f8_sdxl",
    scheduler=scheduler,
    layers=layers,
    marks=re.compile(r"(^|_)transformer_blocks_\d+_attn1_|blocks_\d+_cross_attn_(q_linear|kv_linear|proj)$"),
    header=None,
)
