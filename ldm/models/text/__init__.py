"""Text encoders, their tokenizers, and prompts."""

from __future__ import annotations

from ldm.models.text.base import TextEncoder
from ldm.models.text.clip import TextTower, build_clip, build_encoder, encode_texts, open_clip_config
from ldm.models.text.config import (
    Added,
    AnyText,
    ClipConfig,
    MissingConfig,
    Output,
    Pad,
    QwenConfig,
    T5Config,
    TextConfig,
)
from ldm.models.text.tokenizer import EMOJI_BPE, Overlong, Tokenizer, build_tokenizer

__all__ = [
    "EMOJI_BPE",
    "Added",
    "AnyText",
    "ClipConfig",
    "MissingConfig",
    "Output",
    "Overlong",
    "Pad",
    "QwenConfig",
    "T5Config",
    "TextConfig",
    "TextEncoder",
    "TextTower",
    "Tokenizer",
    "build_clip",
    "build_encoder",
    "build_tokenizer",
    "encode_texts",
    "open_clip_config",
]
