"""What all text encoders share: prompts -> tokens -> states that a denoising network is told.

Legend: B batch, T tokens of the context, D width of the states, P width of the pooled vector, V rows of the table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ldm.types import Cond


class TextEncoder(nn.Module, ABC):
    """A frozen text encoder with its tokenizer."""

    title: ClassVar[str] = "text encoder"
    """What messages call it."""
    config: Any
    model: Any
    """The bare module, whose state dict is what files hold."""
    tokenizer: Any
    """Its prompts' tokens: `Tokenizer` (CLIP) or `PretrainedTokenizer`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self._new: list[Callable[[], Tensor]] = []
        self._first = getattr(config, "vocab_size", 0)

    @abstractmethod
    def forward(self, texts: Sequence[str]) -> Cond:
        """"text" (B, T, D) and, where the encoder gives them, "pooled" (B, P) and "mask" (B, T), True at tokens."""

    @property
    @abstractmethod
    def width(self) -> int:
        """D."""

    @property
    @abstractmethod
    def table(self) -> nn.Embedding:
        """The token embeddings (V, D). Raises ValueError for an encoder that has none."""

    @property
    def context(self) -> int:
        """T."""
        return self.tokenizer.context

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids (B, T) int64; longer prompts are cut, `tokenizer.too_long` tells which."""
        return self.tokenizer(texts)

    @property
    def empty(self) -> Cond:
        """The unconditional input with B = 1: what dropped captions become in training, and guidance's other half."""
        with torch.no_grad():
            return self([""])

    def add_token(self, token: str, count: int, rows: Callable[[], Tensor]) -> None:
        """Let a token stand for `count` new vectors, which `rows` gives as (count, D) at every use.

        Raises ValueError when the token exists.
        """
        self.tokenizer.add(token, range(self._first, self._first + count))
        self._first += count
        self._new.append(rows)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings (B, T, D); ids past the table are the added vectors."""
        table = self.table
        if not self._new:
            return table(tokens)
        size = table.num_embeddings
        rows = torch.cat([rows() for rows in self._new])
        known = table(tokens.clamp(max=size - 1))
        return torch.where((tokens >= size)[..., None], rows[(tokens - size).clamp(min=0)].to(known), known)

    def kept(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The type that a weight of the model is kept in where `dtype` is asked for."""
        return dtype

    def quantize_8bit(self) -> TextEncoder:
        """This encoder with weights of 8 bits, where it can have them; ValueError where not."""
        raise ValueError(f"8-bit weights: the {self.title} has none; they are for T5 and Qwen3")


def own_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Computing in the weights' type, whatever autocast says."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def trimmed(cond: Cond) -> list[Cond]:
    """The same conditioning sample by sample, (T', D) and (P,), without the tokens that its masks leave out.

    Padding that no mask names stays: the network was trained to see it. `padded` puts the samples together again.
    """
    masks = {key: value.bool() for key, value in cond.items() if _parts(key)[0] == "mask"}
    out = []
    for i in range(len(next(iter(cond.values())))):
        one = {key: value[i] for key, value in cond.items() if key not in masks}
        for key, mask in masks.items():
            own = "text" + _parts(key)[1]
            one[own] = one[own][mask[i]]
            one[key] = torch.ones(len(one[own]), dtype=torch.bool, device=mask.device)
        out.append(one)
    return out


def padded(samples: Sequence[Cond], length: int | None = None) -> Cond:
    """Samples as `trimmed` gives them in one batch: states up to the longest of them, or to `length`, filled with zeros.

    A mask, False at what was filled in, is there where the samples have one. Raises ValueError for texts of several
    lengths without a mask, and for more tokens than `length`.
    """
    if not samples:
        raise ValueError("padded: expected at least one sample")
    out = {}
    for key, first in samples[0].items():
        kind, suffix = _parts(key)
        rows = [sample[key] for sample in samples]
        if kind not in ("text", "mask") or first.ndim == 0:
            out[key] = torch.stack(rows)
            continue
        longest = max(len(row) for row in rows)
        if "mask" + suffix not in samples[0]:
            if any(len(row) != longest for row in rows):
                raise ValueError(f"{key}: texts of {sorted({len(r) for r in rows})} tokens without a mask")
            out[key] = torch.stack(rows)
            continue
        if length is not None and longest > length:
            raise ValueError(f"{key}: a text of {longest} tokens is longer than {length}")
        full = pad_sequence(rows, batch_first=True)
        short = (longest if length is None else length) - longest
        out[key] = torch.cat([full, full.new_zeros(len(full), short, *full.shape[2:])], dim=1) if short else full
    return out


def _parts(key: str) -> tuple[str, str]:
    """"mask.1" -> ("mask", ".1")."""
    kind, dot, index = key.partition(".")
    return kind, dot + index
