"""Where scripts of version 0.1 look for `ldm.models.text.prompts`; to be removed with version 0.3."""

from __future__ import annotations

from ldm.models.text.prompts import count_chunks, encode_prompts, notes, pieces, too_long

__all__ = ["count_chunks", "encode_prompts", "notes", "pieces", "too_long"]
