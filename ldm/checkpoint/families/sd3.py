"""Files of SD3 and SD3.5: Stability's, ComfyUI's and kohya's names of its tensors and layers."""

from __future__ import annotations

import math
import re

from ldm.checkpoint.families.base import PICTURES, Files
from ldm.checkpoint.lora_layers import Layer, Table, one, several, under
from ldm.checkpoint.pairs import Pair, layer
from ldm.checkpoint.schedulers import FLOW
from ldm.checkpoint.weights import Source
from ldm.models import others, presets
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


def settings(source: Source, where: str) -> SD3Config:
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


_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_QKV = ("to_q", "to_k", "to_v")


def layers(config: SD3Config) -> Table:
    """Every layer with weights; the last block's text leaves after its attention, with a modulation of two parts."""
    each, table = [config.width] * 3, under("", "", _TOP)
    table["final_layer.adaLN_modulation.1"] = one("norm_out.linear", swapped=True)
    for i in range(config.num_layers):
        last, block, ours = i == config.num_layers - 1, f"joint_blocks.{i}.", f"transformer_blocks.{i}."
        image: dict[str, str | Layer] = {
            "attn.qkv": several("attn.", _QKV, each),
            "attn.proj": "attn.to_out.0",
            "attn.ln_q": "attn.norm_q",
            "attn.ln_k": "attn.norm_k",
            "adaLN_modulation.1": "norm1.linear",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
        }
        if i in config.dual_attention_layers:
            image |= {
                "attn2.qkv": several("attn2.", _QKV, each),
                "attn2.proj": "attn2.to_out.0",
                "attn2.ln_q": "attn2.norm_q",
                "attn2.ln_k": "attn2.norm_k",
            }
        text: dict[str, str | Layer] = {
            "attn.qkv": several("attn.add_", ("q_proj", "k_proj", "v_proj"), each),
            "attn.ln_q": "attn.norm_added_q",
            "attn.ln_k": "attn.norm_added_k",
            "adaLN_modulation.1": one("norm1_context.linear", swapped=last),
        }
        if not last:
            text |= {"attn.proj": "attn.to_add_out", "mlp.fc1": "ff_context.net.0.proj", "mlp.fc2": "ff_context.net.2"}
        table |= under(f"{block}x_block.", ours, image) | under(f"{block}context_block.", ours, text)
    return table


def header(config: SD3Config) -> dict[str, str]:
    """What kohya's scripts write into a file's header."""
    kind = "3-medium" if config.qk_norm is None else "3-5-medium" if config.dual_attention_layers else "3-5-large"
    return {"ss_network_module": "networks.lora_sd3", "ss_base_model_version": kind}


FILES = Files(
    title="Stable Diffusion 3",
    config=SD3Config,
    pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    network=("SD3Transformer2DModel",),
    forms=others.transformer,
    text=("clip", "clip", "t5"),
    needed=1,
    texts=lambda config, pipeline: presets.TEXTS["sd3"],
    nothing=PICTURES,
    mark=MARK,
    pairs=pairs,
    settings=settings,
    encoders=("clip_l", "clip_g", "t5xxl"),
    vae="first_stage_model.",
    autoencoder=lambda config: "kl_f8_sd3",
    scheduler=lambda config: {"_class_name": FLOW, "num_train_timesteps": 1000, "shift": 3.0},
    layers=layers,
    marks=re.compile(r"(^|_)joint_blocks_\d"),
    header=header,
)
