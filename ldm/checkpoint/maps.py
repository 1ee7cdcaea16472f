"""Names of the same weights in other formats: Hugging Face's CLIP text towers against open_clip's.

Maps are strict: a key that nothing accounts for, or one that is absent, is a ValueError that lists it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

State = dict[str, Tensor]

_HF_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_HF_TOP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_HF_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$")
_OPEN_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)$")


def text_to_hf(state: State) -> State:
    """An open_clip text tower's state as HF `CLIPTextModel(WithProjection)` names; q, k, v split."""
    top = {v: k for k, v in _HF_TOP.items()}
    block = {v: k for k, v in _HF_BLOCK.items()}
    out: State = {}
    for key, value in state.items():
        match = _OPEN_LAYER.match(key)
        if key in top:
            out["text_model." + top[key]] = value
        elif key == "text_projection":
            out["text_projection.weight"] = value.T.contiguous()
        elif match is None:
            raise ValueError(f"text tower: no Hugging Face name for {key!r}")
        elif match[2] in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = match[2].rpartition("_")[2]
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                out[f"text_model.encoder.layers.{match[1]}.self_attn.{letter}_proj.{kind}"] = part.contiguous()
        else:
            name, _, kind = match[2].rpartition(".")
            if name not in block:
                raise ValueError(f"text tower: no Hugging Face name for {key!r}")
            out[f"text_model.encoder.layers.{match[1]}.{block[name]}.{kind}"] = value
    return out


def text_from_hf(state: State) -> State:
    """HF `CLIPTextModel(WithProjection)` weights, with or without the `text_model.` prefix, as open_clip's names."""
    out: State = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for full, value in state.items():
        key = full.removeprefix("text_model.")
        match = _HF_LAYER.match(key)
        if key in _HF_TOP:
            out[_HF_TOP[key]] = value
        elif key == "text_projection.weight":
            out["text_projection"] = value.T.contiguous()
        elif key == "embeddings.position_ids":  # a constant that old files carry
            continue
        elif match is None:
            raise ValueError(f"text encoder: unknown key {full!r}")
        elif match[2] in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            parts.setdefault(f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}", {})[match[2][10]] = value
        elif match[2] in _HF_BLOCK:
            out[f"transformer.resblocks.{match[1]}.{_HF_BLOCK[match[2]]}.{match[3]}"] = value
        else:
            raise ValueError(f"text encoder: unknown key {full!r}")
    for key, qkv in parts.items():
        if set(qkv) != set("qkv"):
            raise ValueError(f"text encoder: {key!r} has only {sorted(qkv)} of q, k, v")
        out[key] = torch.cat([qkv["q"], qkv["k"], qkv["v"]])
    return out


def check_keys(what: str, expected: dict[str, torch.Size], given: dict[str, torch.Size]) -> None:
    """Raise ValueError listing missing, extra and wrong-shaped keys."""
    problems = []
    if missing := sorted(set(expected) - set(given)):
        problems.append(f"missing {_listed(missing)}")
    if extra := sorted(set(given) - set(expected)):
        problems.append(f"not known {_listed(extra)}")
    wrong = [
        f"{k} {list(given[k])} instead of {list(expected[k])}"
        for k in sorted(set(expected) & set(given))
        if given[k] != expected[k]
    ]
    if wrong:
        problems.append(f"wrong shape {_listed(wrong)}")
    if problems:
        raise ValueError(f"{what}: " + "; ".join(problems))


def _listed(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} key(s): " + ", ".join(names[:most]) + rest
