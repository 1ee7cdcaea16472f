"""The authors' names of the layers of PixArt's transformer, as ComfyUI's extension and OneTrainer write them."""

from __future__ import annotations

from ldm.checkpoint.lora_layers import Layer, Table, several, under
from ldm.models.transformers.pixart import PixArtConfig

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
