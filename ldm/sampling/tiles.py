"""Denoising large latents in overlapping squares, without seams (MultiDiffusion, arXiv 2302.08113).

Legend: B samples, C channels, h, w latent pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.types import Cond, Denoise


def tiled(denoise: Denoise, *, tile: int, overlap: int) -> Denoise:
    """The estimates of squares of `tile` latent pixels, which overlap by at least `overlap`, blended at every step.

    Each estimate counts the less the nearer it is to an edge inside of the picture, so that neighbours pass into each
    other; all are of the same noise. Of `cond`, "concat" is cut as x is. Raises ValueError unless the overlap is at
    least 1 and less than the tile.
    """
    check_tiles(tile, overlap)

    def whole(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        height, width = x.shape[2:]
        if height <= tile and width <= tile:
            return denoise(x, t, cond)
        total, weights = torch.zeros_like(x), x.new_zeros(1, 1, height, width)
        for top, bottom in spans(height, tile, overlap):
            for left, right in spans(width, tile, overlap):
                part = (..., slice(top, bottom), slice(left, right))
                told = {k: v[part].contiguous() if k == "concat" else v for k, v in cond.items()}
                found = denoise(x[part].contiguous(), t, told)
                down = _ramp(top, bottom, height, overlap, x)
                weight = down[:, None] * _ramp(left, right, width, overlap, x)[None]
                total[part] += weight * found
                weights[part] += weight
        return total / weights

    return whole


def check_tiles(tile: int, overlap: int) -> None:
    """Raise ValueError unless 1 <= overlap < tile."""
    if not 1 <= overlap < tile:
        raise ValueError(f"overlap must be at least 1 and less than the tile's {tile} pixels, got {overlap}")


def spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """First and end of stretches of `tile` over a length, as few as overlap by `overlap`, evenly spread."""
    if length <= tile:
        return [(0, length)]
    count = math.ceil((length - overlap) / (tile - overlap))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    return [(start, start + tile) for start in starts]


def _ramp(first: int, end: int, length: int, overlap: int, like: Tensor) -> Tensor:
    """Weights (end - first,) that rise over the overlap from an edge that is not the picture's."""
    places = torch.arange(end - first, device=like.device, dtype=like.dtype)
    weights = torch.ones_like(places)
    if first > 0:
        weights = torch.minimum(weights, (places + 1) / (overlap + 1))
    if end < length:
        weights = torch.minimum(weights, (end - first - places) / (overlap + 1))
    return weights
