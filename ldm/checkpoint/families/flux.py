"""FLUX.1's files: Black Forest Labs', ComfyUI's and kohya's names of its tensors and layers, XLabs' too."""

from __future__ import annotations

import re
from typing import Any

from ldm.checkpoint.families.base import PICTURES, Files
from ldm.checkpoint.lora_layers import Layer, Table, one, several, under
from ldm.checkpoint.pairs import Pair, layer
from ldm.checkpoint.schedulers import FLOW
from ldm.checkpoint.weights import Source
from ldm.models import others, presets
from ldm.models.transformers.flux import FluxConfig

MARK = "double_blocks.0.img_attn.norm.key_norm.scale"
"""A name that only this family and its relatives have."""
_AXES = {128: (16, 56, 56)}
"""Channels of a head -> how its rotary positions are divided, which no tensor tells."""
_SHIFTED = {"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15}


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


def settings(source: Source, where: str) -> FluxConfig:
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


_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_GUIDANCE = {
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}
_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("q_proj", "k_proj", "v_proj")
ALSO = {"img_in.proj": "img_in"}
"""Other names of the authors' layers: OneTrainer's."""


def layers(config: FluxConfig) -> Table:
    """Every layer with weights."""
    width = config.width
    each, table = [width] * 3, under("", "", _TOP | (_GUIDANCE if config.guidance_embeds else {}))
    table["final_layer.adaLN_modulation.1"] = one("norm_out.linear", swapped=True)
    double: dict[str, str | Layer] = {
        "img_attn.qkv": several("attn.", _QKV, each),
        "img_attn.proj": "attn.to_out.0",
        "img_attn.norm.query_norm": "attn.norm_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "img_mod.lin": "norm1.linear",
        "txt_attn.qkv": several("attn.add_", _ADDED, each),
        "txt_attn.proj": "attn.to_add_out",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
        "txt_mod.lin": "norm1_context.linear",
    }
    single: dict[str, str | Layer] = {
        "linear1": several("", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), [*each, 4 * width]),
        "linear2": "proj_out",
        "modulation.lin": "norm.linear",
        "norm.query_norm": "attn.norm_q",
        "norm.key_norm": "attn.norm_k",
    }
    return table | _blocks(config, double, single)


def xlabs(config: FluxConfig) -> Table:
    """XLabs' names: processors of the authors' blocks, whose single ones correct query, key and value alone."""
    each = [config.width] * 3
    double: dict[str, str | Layer] = {
        "processor.qkv_lora1": several("attn.", _QKV, each),
        "processor.proj_lora1": "attn.to_out.0",
        "processor.qkv_lora2": several("attn.add_", _ADDED, each),
        "processor.proj_lora2": "attn.to_add_out",
    }
    single: dict[str, str | Layer] = {
        "processor.qkv_lora": several("attn.", _QKV, each),
        "processor.proj_lora": "proj_out",
    }
    return _blocks(config, double, single)


def _blocks(config: FluxConfig, double: dict[str, str | Layer], single: dict[str, str | Layer]) -> Table:
    table: Table = {}
    for i in range(config.num_layers):
        table |= under(f"double_blocks.{i}.", f"transformer_blocks.{i}.", double)
    for i in range(config.num_single_layers):
        table |= under(f"single_blocks.{i}.", f"single_transformer_blocks.{i}.", single)
    return table


def unlike(source: Source) -> str | None:
    """Depth and Canny, which take the latents of a picture beside their own."""
    given, taken = source["final_layer.linear.weight"].shape[0], source["img_in.weight"].shape[1]
    return "FLUX.1 Depth or Canny (FluxControlPipeline), which is told a picture" if taken == 2 * given else None


def scheduler(config: FluxConfig) -> dict[str, Any]:
    """That of dev is shifted by the number of tokens, schnell's not at all."""
    dev = config.guidance_embeds
    flow = {"_class_name": FLOW, "num_train_timesteps": 1000, "shift": 3.0 if dev else 1.0}
    return flow | _SHIFTED | {"use_dynamic_shifting": dev}


def header(config: FluxConfig) -> dict[str, str]:
    """What kohya's scripts write into a file's header."""
    return {"ss_network_module": "networks.lora_flux", "ss_base_model_version": "flux1"}


KONTEXT, FILL = "FluxKontextPipeline", "FluxFillPipeline"
FILES = Files(
    title="FLUX.1",
    config=FluxConfig,
    pipelines=("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", KONTEXT, FILL),
    pipeline=lambda config, text: FILL if config.in_channels > config.token_channels else "FluxPipeline",
    network=("FluxTransformer2DModel",),
    forms=others.transformer,
    text=("clip", "t5"),
    needed=2,
    texts=lambda config, pipeline: presets.TEXTS["flux" if config.guidance_embeds else "flux_schnell"],
    nothing=PICTURES,
    mark=MARK,
    pairs=pairs,
    settings=settings,
    unlike=unlike,
    encoders=("clip_l", "t5xxl"),
    autoencoder=lambda config: "kl_f8_flux",
    scheduler=scheduler,
    layers=layers,
    more=(xlabs,),
    also=ALSO,
    marks=re.compile(r"(^|_)(double_blocks|single_blocks|single_transformer_blocks)_\d"),
    header=header,
)
