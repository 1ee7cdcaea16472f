"""Text encoders, their tokenizers, and prompts."""

from __future__ import annotations

from ldm.models.text.clip import TextTower, build_clip, encode_texts, open_clip_config
from ldm.models.text.config import Added, ClipConfig, Output, Pad, TextConfig
from ldm.models.text.tokenizer import EMOJI_BPE, Overlong, Tokenizer, build_tokenizer

__all__ = [
    "EMOJI_BPE",
    "Added",
    "ClipConfig",
    "Output",
    "Overlong",
    "Pad",
    "TextConfig",
    "TextTower",
    "Tokenizer",
    "build_clip",
    "build_tokenizer",
    "encode_texts",
    "open_clip_config",
]
