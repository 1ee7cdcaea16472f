"""The authors' names of the layers of SD3's transformer (Stability's, ComfyUI's and kohya's for SD3 and SD3.5)."""

from __future__ import annotations

from ldm.checkpoint.lora_layers import Layer, Table, one, several, under
from ldm.models.transformers.sd3 import SD3Config

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
