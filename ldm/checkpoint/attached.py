"""Put LoRA and embedding files on a model in memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ldm.adapters.low_rank import Loras
from ldm.adapters.tokens import add_concept
from ldm.checkpoint.embedding_files import check_t5, file_names, read_embeddings
from ldm.checkpoint.lora_files import read_adapter
from ldm.models.network import Network
from ldm.models.text import T5Encoder, TextEncoder

log = logging.getLogger(__name__)


def attach_lora(
    merged: Loras,
    network: Network,
    text: Sequence[TextEncoder],
    path: str | Path,
    weight: float,
    name: str,
    lenient: bool,
) -> str:
    """Merge a file's corrections under a name, which is returned, and add the tokens that it bundles."""
    found = read_adapter(path, network, text, lenient=lenient)
    merged.add(name, found.corrections, weight)
    for token, rows in found.embeddings.items():
        log.warning("LoRA %s: holds an embedding too, called by %r", path, add_concept(text, token, rows)[0])
    return name


def attach_embedding(text: Sequence[TextEncoder], path: str | Path, token: str | None) -> list[str]:
    """Teach the towers a file's tokens; the words that call them: the file's own, and the file's name."""
    check_t5(path, there=any(isinstance(encoder, T5Encoder) for encoder in text))
    words: list[str] = []
    for name, rows in read_embeddings(path, token).items():
        words += add_concept(text, name, rows, also=[] if token else file_names(path))
    return words
