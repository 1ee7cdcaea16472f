"""open_clip's byte-pair tokenizer, with tokens that a model or a user adds.

Legend: B batch, T tokens of the context.
"""

from __future__ import annotations

import gzip
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.models.shipped import ASSETS
from ldm.models.text.config import Added, ClipConfig, Pad, TextConfig

START, END = "<|startoftext|>", "<|endoftext|>"
"""The markers in Hugging Face's files."""
EMOJI_BPE = ASSETS / "clip_emoji" / "bpe.txt.gz"


@dataclass(frozen=True)
class Overlong:
    """A prompt that does not fit: its index, its length in tokens without the two markers, and what is cut off."""

    index: int
    tokens: int
    limit: int
    cut: str


class Tokenizer:
    """open_clip's byte-pair tokenizer on a merges file; cuts after `context` - 1 tokens and ends with the end token.

    `special`: the markers and the token of padding are found in prompts too, wherever they stand, as transformers'
    CLIPTokenizer does it. So with `pad` "zero" every "!" is token 0, though open_clip, with which such towers were
    trained, joins it to its word (SD 2.x, the second tower of SDXL and SD3).
    """

    def __init__(
        self,
        bpe: str = "standard",
        *,
        context: int = 77,
        pad: Pad = "eot",
        added: Sequence[Added] = (),
        special: bool = False,
    ) -> None:
        self.bpe, self.context, self.pad = bpe, context, pad
        self._simple = _simple_tokenizer(bpe)
        self.start, self.end = self._simple.sot_token_id, self._simple.eot_token_id
        self.vocab_size: int = self._simple.vocab_size
        self.added: dict[str, list[int]] = {}
        self._any_case: dict[str, list[int]] = {}
        self._special: dict[str, list[int]] = {}
        if special:
            self._special = {START: [self.start], END: [self.end]}
            self._special |= {self._simple.decoder[0]: [0]} if pad == "zero" else {}
        self._words: set[str] = set()
        """Those that `add` added: a folder's own are found inside words too, as transformers does."""
        for token in added:
            ids = _numbered(token, added)
            self.added[token.text] = ids
            if token.any_case:
                self._any_case[_folded(token.text)] = ids

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids (B, T) int64."""
        if isinstance(texts, str):
            raise ValueError("expected a list of prompts, got one string")
        rows = torch.full((len(texts), self.context), self.end if self.pad == "eot" else 0, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = self.encode(text)[: self.context - 2]
            row[: len(ids) + 2] = torch.tensor([self.start, *ids, self.end])
        return rows

    @property
    def limit(self) -> int:
        """How many tokens of a prompt's own fit between the two markers."""
        return self.context - 2

    def too_long(self, texts: Sequence[str]) -> list[Overlong]:
        """The prompts of which `__call__` leaves out the end."""
        limit = self.limit
        ids = [self.encode(text) for text in texts]
        return [Overlong(i, len(x), limit, self.decode(x[limit:])) for i, x in enumerate(ids) if len(x) > limit]

    def encode(self, text: str) -> list[int]:
        """Ids of one text without markers, of any length; an added token stands for all its ids."""
        names = [*self.added, *self._special]
        if not self.added and not any(name in text for name in names):
            return self._simple.encode(text)
        parts = re.split("(" + "|".join(map(self._pattern, sorted(names, key=len, reverse=True))) + ")", text)
        return [i for part in parts for i in self._own(part) or self._simple.encode(part)]

    def _pattern(self, token: str) -> str:
        if token in self._words:
            return whole_word(token)
        if _folded(token) not in self._any_case:
            return re.escape(token)
        return "(?i:" + r"\s+".join(map(re.escape, token.split())) + ")"

    def _own(self, part: str) -> list[int] | None:
        """The ids of an added token."""
        return self.added.get(part) or self._special.get(part) or self._any_case.get(_folded(part))

    def add(self, token: str, ids: Sequence[int]) -> None:
        """Let a token stand for ids. Raises ValueError when the vocabulary or an earlier addition has it."""
        if not token or token != " ".join(token.split()):
            raise ValueError(f"token {token!r}: expected words with one space between them, such as <thing>")
        if self._own(token):
            raise ValueError(f"token {token!r}: exists already; choose another name")
        if len(known := self._simple.encode(token)) < 2:
            raise ValueError(
                f"token {token!r}: the vocabulary has it already ({known}); choose another, such as <thing>"
            )
        self.added[token] = list(ids)
        self._words.add(token)

    def free(self, token: str) -> bool:
        """Whether `add` would take it."""
        return bool(token) and not self._own(token) and len(self._simple.encode(token)) > 1

    def alias(self, token: str, of: str) -> None:
        """Let another name stand for what an added token stands for."""
        self.add(token, self.added[of])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids without markers; of an added token's ids the first one is its name."""
        names = {own[0]: token for token, own in reversed(self.added.items())}
        parts: list[str] = []
        run: list[int] = []
        for i in [*ids, -1]:
            if 0 <= i < self.vocab_size:
                run.append(i)
                continue
            parts += [self._simple.decode(run).strip()] if run else []
            parts += [names[i]] if i in names else []
            run = []
        return " ".join(parts)

    def vocabulary(self) -> dict[str, int]:
        """Token -> id with the marker names of Hugging Face's CLIP tokenizer (`vocab.json`)."""
        ids = dict(self._simple.encoder)
        del ids["<start_of_text>"], ids["<end_of_text>"]
        return {**ids, START: self.start, END: self.end}

    def merges(self) -> list[tuple[str, str]]:
        """The merges in order of rank (`merges.txt`)."""
        return sorted(self._simple.bpe_ranks, key=self._simple.bpe_ranks.__getitem__)


def _folded(token: str) -> str:
    return " ".join(token.lower().split())


def _numbered(token: Added, added: Sequence[Added]) -> list[int]:
    """The ids that a token stands for: its own, and those of <token>_1, <token>_2 ... (diffusers' several vectors)."""
    ids, by_text = [token.id], {a.text: a.id for a in added}
    while (further := by_text.get(f"{token.text}_{len(ids)}")) is not None:
        ids.append(further)
    return ids


def whole_word(token: str) -> str:
    """A pattern for a token that is not a part of a longer word."""
    start, end = (r"\b" if c.isalnum() else "" for c in (token[0], token[-1]))
    return start + re.escape(token) + end


@lru_cache(maxsize=8)
def _simple_tokenizer(bpe: str) -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    if bpe == "standard":
        return SimpleTokenizer()
    path = EMOJI_BPE if bpe == "emoji" else Path(bpe)
    if not path.is_file():
        raise ValueError(f"bpe {bpe!r}: expected 'standard', 'emoji' or a file of merges; no such file")
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
    lines = [line for line in text.split("\n") if line.strip()]
    if bad := [line for line in lines[1:] if len(line.split()) != 2]:
        raise ValueError(f"bpe {bpe!r}: expected a header line, then two tokens a line; got {bad[0]!r}")
    with tempfile.NamedTemporaryFile(suffix=".txt.gz") as file:  # open_clip reads a path, and counts an empty last line
        file.write(gzip.compress("\n".join(lines).encode("utf-8")))
        file.flush()
        return SimpleTokenizer(bpe_path=file.name)


def build_tokenizer(config: TextConfig | ClipConfig) -> Tokenizer:
    """The tokenizer that belongs to a tower; raises ValueError if its vocabulary has another size."""
    if isinstance(config, TextConfig):
        context = config.max_length or config.context_length
        tokenizer = Tokenizer(config.bpe, context=context, pad=config.pad, added=config.added, special=True)
    else:
        tokenizer = Tokenizer(config.bpe, context=config.context_length, pad=config.pad)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"vocab_size {config.vocab_size}: bpe {config.bpe!r} has {tokenizer.vocab_size} tokens")
    return tokenizer
