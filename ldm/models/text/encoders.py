"""All text encoders: built from their settings, and asked together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from ldm.models.text.base import TextEncoder
from ldm.models.text.clip import TextTower
from ldm.models.text.config import AnyText, MissingConfig, QwenConfig, T5Config, T5Padding, TextConfig
from ldm.models.text.missing import MissingT5
from ldm.models.text.qwen import QwenEncoder
from ldm.models.text.t5 import T5Encoder
from ldm.types import Cond

ENCODERS: dict[type[AnyText], type[TextEncoder]] = {
    TextConfig: TextTower,
    T5Config: T5Encoder,
    QwenConfig: QwenEncoder,
    MissingConfig: MissingT5,
}


def build_encoder(config: AnyText) -> TextEncoder:
    """The text encoder of some settings, with random weights.

    Raises ValueError where it needs transformers, which are not installed.
    """
    return ENCODERS[type(config)](config)


def filled_encoder(
    config: AnyText, state: Mapping[str, Tensor], dtype: torch.dtype | None = None, *, int8: bool = False
) -> TextEncoder:
    """A frozen encoder of weights by native name, which it keeps as they are: no more memory than they have.

    `dtype` is what they become; None leaves them. Weights that `TextEncoder.kept` names stay in float32. `int8`: those
    of linear layers are already of 8 bits, as `int8.stored` gives them.
    """
    if isinstance(config, (T5Config, QwenConfig)):  # random weights first would take minutes
        with torch.device("meta"):
            encoder = build_encoder(config)
    else:
        encoder = build_encoder(config)
    if int8:
        encoder.quantize_8bit()
    if dtype is not None:
        state = {k: v.to(encoder.kept(k, dtype)) if v.is_floating_point() else v for k, v in state.items()}
    encoder.model.load_state_dict(state, strict=True, assign=True)
    if isinstance(encoder, QwenEncoder):
        encoder.place_rotary()
    return (encoder if dtype is None else encoder.to(dtype)).requires_grad_(False).eval()


def pad_with(encoders: Sequence[TextEncoder], padding: T5Padding, key: str = "t5_padding") -> None:
    """How T5 treats its padding from now on, where the network sees it (SD3, FLUX.1).

    Raises ValueError naming `key` for another word, and for "zero" where no T5 is or the network does not see padding.
    """
    if padding not in (known := get_args(T5Padding)):
        raise ValueError(f"{key}: {padding!r} is not one of {list(known)}")
    seen = [e for e in encoders if isinstance(e, T5Encoder) and not e.config.masked]
    if padding == "zero" and not seen:
        raise ValueError(
            f"{key}: 'zero', but this model has no T5 whose padding its network sees (SD3 and FLUX.1 have)"
        )
    for encoder in seen:
        encoder.config = replace(encoder.config, padding=padding)


def encode_texts(encoders: Sequence[TextEncoder], texts: Sequence[str]) -> Cond:
    """What a network is told of texts by all of its encoders.

    CLIP towers: their states side by side, "text" (B, T, sum of D), and the last one's "pooled" (B, P). One encoder
    alone: what it gives. Otherwise what each gives, with its place in the list behind the key: "text.0", "pooled.0",
    "text.1", "mask.1" ...; the network joins them as its family does.
    """
    return joined(encoders, [encoder(texts) for encoder in encoders])


def joined(encoders: Sequence[TextEncoder], conds: Sequence[Cond]) -> Cond:
    """What `encode_texts` makes of each encoder's answer, in float32 whatever it was computed in."""
    half = (torch.float16, torch.bfloat16)
    conds = [{k: v.float() if v.dtype in half else v for k, v in cond.items()} for cond in conds]
    if len(conds) == 1:
        return conds[0]
    if all(isinstance(encoder, TextTower) for encoder in encoders):
        return {"text": torch.cat([c["text"] for c in conds], dim=-1), "pooled": conds[-1]["pooled"]}
    return {f"{key}.{i}": value for i, cond in enumerate(conds) for key, value in cond.items()}
