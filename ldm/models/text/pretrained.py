"""Tokenizers that transformers reads from a model's own files."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.models.text.tokenizer import Overlong

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
"""What a tokenizer's folder may hold."""
_VOCABULARIES = ("tokenizer.json", "spiece.model", "vocab.json")
MISSING = "needs the package transformers: pip install 'ldm[transformers]'"


class PretrainedTokenizer:
    """Texts -> ids, cut and padded to `context` tokens, the end token among them."""

    def __init__(self, folder: Path, context: int) -> None:
        self.folder, self.context = folder, context
        self.auto = load_tokenizer(folder)
        self.end, self.pad = int(self.auto.eos_token_id), int(self.auto.pad_token_id)
        self.vocab_size = len(self.auto)
        self.added: dict[str, list[int]] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids (B, T) int64."""
        return self.both(texts)[0]

    def both(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B, T) int64, and True (B, T) where they are no padding."""
        if isinstance(texts, str):
            raise ValueError("expected a list of prompts, got one string")
        rows = torch.full((len(texts), self.context), self.pad, dtype=torch.int64)
        mask = torch.zeros_like(rows, dtype=torch.bool)
        for row, seen, text in zip(rows, mask, texts, strict=True):
            ids = self._marked(self.encode(text))
            row[: len(ids)], seen[: len(ids)] = torch.tensor(ids, dtype=torch.int64), True
        return rows, mask

    def _marked(self, ids: list[int]) -> list[int]:
        """Cut to the context, with the end token after them."""
        return [*ids[: self.context - 1], self.end]

    def encode(self, text: str) -> list[int]:
        """Ids of one text without markers, of any length; an added token stands for all its ids."""
        if not self.added:
            return self._ids(text)
        names = sorted(self.added, key=len, reverse=True)
        parts = re.split("(" + "|".join(re.escape(name) for name in names) + ")", text)
        return [i for part in parts if part for i in self.added.get(part) or self._ids(part)]

    def _ids(self, text: str) -> list[int]:
        return self.auto(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return self.auto.decode(list(ids))

    def too_long(self, texts: Sequence[str]) -> list[Overlong]:
        """The prompts of which `__call__` leaves out the end."""
        limit = self.context - 1
        ids = [self.encode(text) for text in texts]
        return [Overlong(i, len(x), limit, self.decode(x[limit:])) for i, x in enumerate(ids) if len(x) > limit]

    def free(self, token: str) -> bool:
        """Whether `add` would take it."""
        return bool(token) and token not in self.added and len(self._ids(token)) > 1

    def add(self, token: str, ids: Sequence[int]) -> None:
        """Let a token stand for ids. Raises ValueError when the vocabulary or an earlier addition has it."""
        if not self.free(token):
            raise ValueError(f"token {token!r}: exists already; choose another, such as <thing>")
        self.added[token] = list(ids)

    def alias(self, token: str, of: str) -> None:
        """Let another name stand for what an added token stands for."""
        self.add(token, self.added[of])

    def save(self, folder: Path) -> None:
        """Copy its files as they are."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder, without code of the folder's. Raises ValueError where it holds none."""
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ValueError(f"tokenizer {str(folder)!r}: expected one of {list(_VOCABULARIES)} in this folder")
    transformers = the_package("a T5 or Qwen tokenizer")
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"tokenizer {str(folder)!r}: transformers cannot read it: {error}") from error


def the_package(what: str) -> Any:
    """The package transformers. Raises ValueError saying how to install it."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{what} {MISSING}") from error
    return transformers
