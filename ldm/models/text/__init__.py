"""Text encoders, their tokenizers, and prompts."""

from __future__ import annotations

from ldm.models.text.base import TextEncoder, padded, trimmed
from ldm.models.text.clip import TextTower, build_clip, open_clip_config
from ldm.models.text.config import (
    Added,
    AnyText,
    ClipConfig,
    MissingConfig,
    Output,
    Pad,
    QwenConfig,
    T5Config,
    T5Padding,
    TextConfig,
)
from ldm.models.text.encoders import build_encoder, encode_texts, filled_encoder, pad_with
from ldm.models.text.missing import MissingT5
from ldm.models.text.precision import TextPrecision, check_text_precision, in_int8, text_bytes, text_dtype
from ldm.models.text.pretrained import copy_tokenizer
from ldm.models.text.qwen import QwenEncoder
from ldm.models.text.t5 import T5Encoder, T5Tokenizer
from ldm.models.text.tokenizer import EMOJI_BPE, Overlong, Tokenizer, build_tokenizer

__all__ = [
    "EMOJI_BPE",
    "Added",
    "AnyText",
    "ClipConfig",
    "MissingConfig",
    "MissingT5",
    "Output",
    "Overlong",
    "Pad",
    "QwenConfig",
    "QwenEncoder",
    "T5Config",
    "T5Encoder",
    "T5Padding",
    "T5Tokenizer",
    "TextConfig",
    "TextEncoder",
    "TextPrecision",
    "TextTower",
    "Tokenizer",
    "build_clip",
    "build_encoder",
    "build_tokenizer",
    "check_text_precision",
    "copy_tokenizer",
    "encode_texts",
    "filled_encoder",
    "in_int8",
    "open_clip_config",
    "pad_with",
    "padded",
    "text_bytes",
    "text_dtype",
    "trimmed",
]
