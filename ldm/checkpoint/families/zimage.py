"""Z-Image's files: its authors' names, as ComfyUI's and kohya's scripts for it have them."""

from __future__ import annotations

import logging
import re

from ldm.checkpoint.families.base import Files
from ldm.checkpoint.lora_layers import Layer, Table, several, under
from ldm.checkpoint.pairs import Pair, layer
from ldm.checkpoint.schedulers import FLOW
from ldm.checkpoint.weights import Source
from ldm.models import others, presets
from ldm.models.transformers.presets import ZIMAGE
from ldm.models.transformers.zimage import ZImageConfig

log = logging.getLogger(__name__)
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


def settings(source: Source, where: str) -> ZImageConfig:
    """What the shapes of a file in these names tell; patches are of 2 x 2 pixels, a head as wide as the published."""
    log.warning("%s: nothing tells Z-Image from its Turbo; Turbo's shift of 3 is taken (the base's is 6)", where)
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


_QKV = ("to_q", "to_k", "to_v")


def layers(config: ZImageConfig) -> Table:
    """Every layer with weights."""
    size = f"{config.patch}-1"
    ends = ("cap_embedder.0", "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")
    table = under("", "", {name: name for name in ends})
    table |= under("x_embedder", f"all_x_embedder.{size}", {"": ""})
    final = ("linear", "adaLN_modulation.1")
    table |= under("final_layer.", f"all_final_layer.{size}.", {name: name for name in final})
    same = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "attention_norm1", "attention_norm2")
    same += ("ffn_norm1", "ffn_norm2")
    block: dict[str, str | Layer] = {
        "attention.qkv": several("attention.", _QKV, [config.dim] * 3),
        "attention.out": "attention.to_out.0",
        "attention.q_norm": "attention.norm_q",
        "attention.k_norm": "attention.norm_k",
        **{name: name for name in same},
    }
    told = block | {"adaLN_modulation.0": "adaLN_modulation.0"}
    for stack, count, each in (
        ("noise_refiner", config.n_refiner_layers, told),
        ("context_refiner", config.n_refiner_layers, block),
        ("layers", config.n_layers, told),
    ):
        for i in range(count):
            table |= under(f"{stack}.{i}.", f"{stack}.{i}.", each)
    return table


def header(config: ZImageConfig) -> dict[str, str]:
    """What musubi-tuner writes into a file's header."""
    return {"ss_network_module": "networks.lora_zimage", "ss_base_model_version": "z_image"}


FILES = Files(
    title="Z-Image",
    config=ZImageConfig,
    pipelines=("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
    network=("ZImageTransformer2DModel",),
    forms=others.zimage,
    text=("qwen",),
    needed=1,
    texts=lambda config, pipeline: presets.TEXTS["zimage"],
    mark=MARK,
    pairs=pairs,
    settings=settings,
    unused=(UNUSED,),
    encoders=("qwen3_4b",),
    autoencoder=lambda config: "kl_f8_flux",
    scheduler=lambda config: {"_class_name": FLOW, "num_train_timesteps": 1000, "shift": 3.0},
    layers=layers,
    marks=re.compile(r"(^|_)layers_\d+_(attention_(to_|qkv)|adaLN_)"),
    header=header,
)
"""The scheduler is that of Z-Image's Turbo."""
