"""Tokens led around a span of blocks in training (TREAD: Krause et al. 2025, arXiv 2501.04765).

Legend: B batch, N image tokens, K of them that stay in the span, S tokens of a sequence, L of them before the image's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.models.transformers.positions import Rotary


@dataclass(frozen=True)
class Span:
    """Blocks `first` to `last`, both included, in the order in which `skip` counts them."""

    first: int
    last: int


class Routed:
    """One forward pass: `enter` before and `leave` after each block's number, `rotary` and `mask` for each block."""

    def __init__(self, span: Span | None, kept: Tensor | None, tokens: int) -> None:
        """`kept` (B, K) int64: ascending numbers of the image tokens that stay, of `tokens`; None: nothing is routed.

        Raises ValueError for tokens that are to stay where no span is set.
        """
        if kept is not None and span is None:
            raise ValueError('cond "route" needs a span of blocks; set `routing` of the network')
        self._span = span if kept is not None else None
        self._kept = kept if kept is not None else torch.empty(0, 0, dtype=torch.long)
        self._count = tokens
        self._whole = torch.empty(0)
        self._turned: Rotary | None = None

    def enter(self, block: int, x: Tensor, start: int = 0) -> Tensor:
        """(B, S, D) without the tokens that are led around, before the span's first block; else as it is.

        `start`: L.
        """
        if self._span is None or block != self._span.first:
            return x
        self._whole = x[:, start : start + self._count]
        return self._chosen(x, start)

    def leave(self, block: int, x: Tensor, start: int = 0) -> Tensor:
        """All tokens again after the span's last block: those that were led around as they were before it."""
        if self._span is None or block != self._span.last:
            return x
        end = start + self._kept.shape[1]
        at = self._kept[..., None].expand(-1, -1, x.shape[-1])
        image = self._whole.to(x.dtype).scatter(1, at, x[:, start:end])
        return torch.cat([x[:, :start], image, x[:, end:]], dim=1)

    def rotary(self, block: int, rotary: Rotary, start: int = 0) -> Rotary:
        """Cosines and sines (S, 1, R) or (B, S, 1, R) of the tokens that the block sees."""
        if not self._inside(block):
            return rotary
        if self._turned is None:
            b = len(self._kept)
            wide = (x if x.ndim == 4 else x[None] for x in rotary)
            cos, sin = (self._chosen(x.expand(b, -1, -1, -1).flatten(2), start)[:, :, None] for x in wide)
            self._turned = cos, sin
        return self._turned

    def mask(self, block: int, mask: Tensor | None, start: int = 0) -> Tensor | None:
        """(B, 1, 1, S) of the tokens that the block sees."""
        if mask is None or not self._inside(block):
            return mask
        return self._chosen(mask[:, 0, 0, :, None], start)[:, None, None, :, 0]

    def _inside(self, block: int) -> bool:
        return self._span is not None and self._span.first <= block <= self._span.last

    def _chosen(self, x: Tensor, start: int) -> Tensor:
        """(B, S, D) -> (B, S - N + K, D)."""
        end = start + self._count
        kept = x[:, start:end].gather(1, self._kept[..., None].expand(-1, -1, x.shape[-1]))
        return kept if start == 0 and end == x.shape[1] else torch.cat([x[:, :start], kept, x[:, end:]], dim=1)
