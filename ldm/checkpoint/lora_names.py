"""What a tensor of a LoRA file is called: the layer and the tensor's part, in the forms of many tools.

PEFT's names begin with `base_model.model.`; kohya, LyCORIS, OneTrainer, XLabs and diffusers before 0.19 have endings of
their own. What the layers are called is in `lora_families.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_PARTS = {
    "lora_A": "down",
    "lora_B": "up",
    "lora.down": "down",
    "lora.up": "up",
    "lora_linear_layer.down": "down",
    "lora_linear_layer.up": "up",
    "lora_down": "down",
    "lora_up": "up",
    "lora_mid": "mid",
    "lora_magnitude_vector": "magnitude",
    "dora_scale": "dora_scale",
    "alpha": "alpha",
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "w_norm",
    "b_norm": "b_norm",
    **{k: k for k in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{k: k for k in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
    "oft_blocks": "oft_blocks",
    "oft_diag": "oft_blocks",
    "rescale": "rescale",
    "oft_R": "oft_R",
}
_ENDING = re.compile(
    r"\.(" + "|".join(re.escape(k) for k in sorted(_PARTS, key=len, reverse=True)) + r")"
    r"(?:\.(?!weight$|bias$)([^.]+))?(\.weight|\.bias)?$"
)
_PROCESSOR = re.compile(r"(?:\.processor)?\.(to_\w+)_lora\.(down\.weight|up\.weight|alpha)$")
_XLABS = re.compile(r"(\.processor\.(?:qkv|proj)_lora[12]?)\.(down|up)\.weight$")
_WHOLE = re.compile(r"(?:(\.(?:query|key)_norm)\.scale|(\.norm_(?:added_)?[qk])\.weight)$")
_IN_TOWERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True)
class Named:
    """One tensor's name: its layer as the file has it, its part, and the adapter's name where PEFT wrote one."""

    layer: str
    part: str
    adapter: str = ""


def split(key: str) -> Named | None:
    """What a tensor's name says; None where it is no part of a correction that is known here."""
    plain = re.sub(r"(^|\.)_orig_mod\.", r"\1", key)
    plain = plain.removeprefix("base_model.model.").removeprefix("module.")
    if match := _PROCESSOR.search(plain):
        before, name = plain[: match.start()], match[1]
        if before.endswith("self_attn"):
            name = _IN_TOWERS.get(name, name)
        layer = f"{before}.{name}" + (".0" if name == "to_out" else "")
        return Named(layer, {"down.weight": "down", "up.weight": "up"}.get(match[2], match[2]))
    if match := _XLABS.search(plain):
        return Named(plain[: match.end(1)], match[2])
    if match := _WHOLE.search(plain):  # a norm that a control LoRA replaces
        return Named(plain[: match.end(match.lastindex or 0)], "whole")
    if match := _ENDING.search(plain):
        part = _PARTS[match[1]]
        if match[3] == ".bias":
            if part != "up":
                return None
            part = "up_bias"
        return Named(plain[: match.start()], part, match[2] or "")
    return None


def plain(layer: str) -> str:
    """A layer's name as it is compared: with underscores, also where a tool ends it with one."""
    return layer.replace(".", "_").rstrip("_")
