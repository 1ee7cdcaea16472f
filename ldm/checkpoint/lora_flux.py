"""The authors' names of the layers of FLUX.1's transformer (Black Forest Labs', ComfyUI's and kohya's), and XLabs'."""

from __future__ import annotations

from ldm.checkpoint.lora_layers import Layer, Table, one, several, under
from ldm.models.transformers.flux import FluxConfig

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
