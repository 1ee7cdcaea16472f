"""In what text encoders are kept and computed that are only used, not trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import nn

from ldm.models.text.base import TextEncoder
from ldm.models.text.config import AnyText, QwenConfig, T5Config

TextPrecision = Literal["fp32", "bf16", "fp16", "int8"]
"""int8: T5's and Qwen3's linear layers have weights of 8 bits and compute in float32; CLIP beside them is in fp32."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32}


def text_dtype(precision: TextPrecision) -> torch.dtype:
    """The type of all weights but those of 8 bits."""
    return _DTYPES[precision]


def in_int8(precision: TextPrecision, config: AnyText) -> bool:
    """Whether the encoder of these settings then has weights of 8 bits."""
    return precision == "int8" and isinstance(config, (T5Config, QwenConfig))


def check_text_precision(
    precision: str, configs: Sequence[AnyText] | None = None, key: str = "text_precision", *, trains: bool = False
) -> None:
    """Raise ValueError naming `key` for an unknown precision, and for one that these encoders cannot have.

    `trains`: they are trained, or their gradients are.
    """
    if precision not in (known := get_args(TextPrecision)):
        raise ValueError(f"{key}: {precision!r} is not one of {list(known)}")
    if trains and precision != "fp32":
        raise ValueError(f"{key}: {precision!r}, but the text encoders take part in training, which needs 'fp32'")
    if configs is not None and precision == "int8" and not any(isinstance(c, (T5Config, QwenConfig)) for c in configs):
        raise ValueError(
            f"{key}: 'int8', but this model's text encoders are CLIP's, which have no weights of 8 bits (T5 and Qwen3 "
            "have); 'fp32', 'bf16' and 'fp16' are possible"
        )


def text_bytes(encoder: TextEncoder, precision: TextPrecision) -> float:
    """Bytes of an encoder's weights, also of one on the meta device."""
    dtype, eight = text_dtype(precision), in_int8(precision, encoder.config)
    wide = {f"{name}.weight" for name, m in encoder.model.named_modules() if eight and isinstance(m, nn.Linear)}
    total = 0
    for name, p in encoder.model.named_parameters():
        total += p.numel() + 4 * len(p) if name in wide else p.numel() * encoder.kept(name, dtype).itemsize
    return float(total)
