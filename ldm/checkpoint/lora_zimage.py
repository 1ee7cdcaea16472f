"""The authors' names of the layers of Z-Image's transformer, as ComfyUI and kohya's scripts for it have them."""

from __future__ import annotations

from ldm.checkpoint.lora_layers import Layer, Table, several, under
from ldm.models.transformers.zimage import ZImageConfig

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
