"""Decoding in overlapping tiles: the memory of a tile instead of the picture's, and no seams.

What joins distant pixels is not cut: convolutions at latent resolution and the attention run on the whole picture, and
the norms of all tiles share the statistics of the whole, gathered in a first pass over the tiles. What is left to the
tiles is local, and overlaps wider than its reach agree, so nothing has to be blended away.

Legend: B batch, Z latent channels, h, w latent pixels, K groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ldm.models.autoencoder import Autoencoder
from ldm.models.layers import GroupNorm

OVERLAP = 8
"""Latent pixels that a tile sees beyond what it draws, on each side."""


@dataclass(frozen=True)
class Span:
    """One side of a tile: it draws [start, end), and sees [low, high)."""

    start: int
    end: int
    low: int
    high: int


def spans(size: int, tile: int, overlap: int = OVERLAP) -> list[Span]:
    """Tiles of equal length, up to one, that draw [0, size) without a gap."""
    count = -(-size // tile)
    edges = [round(i * size / count) for i in range(count + 1)]
    return [Span(a, b, max(0, a - overlap), min(size, b + overlap)) for a, b in pairwise(edges)]


@torch.no_grad()
def decode_tiled(model: Autoencoder, z: Tensor, tile: int, overlap: int = OVERLAP) -> Tensor:
    """Unscaled latents (B, Z, h, w) -> images as `Autoencoder.decode`, in tiles of about `tile` latent pixels a side.

    Costs twice the time, and the memory of (tile + 2 overlap)^2. Raises ValueError for a tile under 1.
    """
    if tile < 1:
        raise ValueError(f"tile must be at least 1 latent pixel, got {tile}")
    rows, columns = spans(z.shape[2], tile, overlap), spans(z.shape[3], tile, overlap)
    if len(rows) * len(columns) == 1:
        return model.decode(z)
    decoder = model.decoder
    h = decoder.mid_block(decoder.conv_in(z if model.post_quant_conv is None else model.post_quant_conv(z)))
    norms = [
        m for part in (decoder.up_blocks, decoder.conv_norm_out) for m in part.modules() if isinstance(m, GroupNorm)
    ]
    with _Statistics(norms) as statistics:
        for part, inside in _parts(h, rows, columns):
            statistics.look_at(part.shape[2], inside)
            _finish(model, part)
    try:
        for norm in norms:
            norm.given = statistics.of(norm)
        return _drawn(model, h, rows, columns)
    finally:
        for norm in norms:
            norm.given = None


def _finish(model: Autoencoder, h: Tensor) -> Tensor:
    for block in model.decoder.up_blocks:
        h = block(h)
    return model.decoder.conv_out(model.decoder.conv_norm_out(h))


def _drawn(model: Autoencoder, h: Tensor, rows: list[Span], columns: list[Span]) -> Tensor:
    f = model.factor
    parts = iter(_parts(h, rows, columns))
    lines = []
    for _ in rows:
        line = []
        for _ in columns:
            part, (top, left, height, width) = next(parts)
            line.append(_finish(model, part)[..., top * f : (top + height) * f, left * f : (left + width) * f])
        lines.append(torch.cat(line, dim=3))
    return torch.cat(lines, dim=2)


def _parts(h: Tensor, rows: list[Span], columns: list[Span]) -> Iterator[tuple[Tensor, tuple[int, int, int, int]]]:
    """What each tile sees, and where in it lies what it draws: (top, left, height, width)."""
    for r in rows:
        for c in columns:
            inside = (r.start - r.low, c.start - c.low, r.end - r.start, c.end - c.start)
            yield h[..., r.low : r.high, c.low : c.high], inside


class _Statistics:
    """Sums over what the tiles draw of each norm's input, by hooks while a `with` block lasts."""

    def __init__(self, norms: list[GroupNorm]) -> None:
        self.norms, self._height, self._inside = norms, 1, (0, 0, 0, 0)
        self._sums: dict[GroupNorm, list[Any]] = {norm: [0.0, 0.0, 0] for norm in norms}
        self._hooks: list[Any] = []

    def __enter__(self) -> _Statistics:
        self._hooks = [norm.register_forward_pre_hook(self._see) for norm in self.norms]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def look_at(self, height: int, inside: tuple[int, int, int, int]) -> None:
        """The next tile: its latent height, and where in it lies what it draws."""
        self._height, self._inside = height, inside

    def _see(self, norm: Any, inputs: tuple[Tensor]) -> None:
        x = inputs[0]
        scale = x.shape[2] // self._height
        top, left, height, width = (v * scale for v in self._inside)
        seen = x[..., top : top + height, left : left + width].unflatten(1, (norm.num_groups, -1)).flatten(2).double()
        sums = self._sums[norm]
        sums[0], sums[1], sums[2] = sums[0] + seen.sum(2), sums[1] + seen.square().sum(2), sums[2] + seen.shape[2]

    def of(self, norm: GroupNorm) -> tuple[Tensor, Tensor]:
        """Mean and variance (B, K)."""
        total, squares, count = self._sums[norm]
        mean = total / count
        kind = norm.weight.dtype
        return mean.to(kind), (squares / count - mean.square()).clamp(min=0).to(kind)
