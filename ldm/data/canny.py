"""Canny's edges (1986) of 8-bit pictures, bit for bit as `cv2.Canny(picture, low, high)` gives them.

Sobel's derivatives over three pixels with repeated borders, the sum of their amounts as strength, no smoothing before:
what published ControlNets were trained with.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_ALL, _LESS, _MORE = slice(None), slice(None, -1), slice(1, None)
_NEIGHBOURS = (
    ((_ALL, _LESS), (_ALL, _MORE)),
    ((_LESS, _ALL), (_MORE, _ALL)),
    ((_LESS, _LESS), (_MORE, _MORE)),
    ((_LESS, _MORE), (_MORE, _LESS)),
)
"""Each pixel's neighbours to the right, below and on both diagonals, as parts of a picture laid over each other."""
_TAN = round(math.tan(math.pi / 8) * (1 << 15))  # of 22.5 degrees, in fixed point


def canny(pixels: NDArray[np.uint8], low: float, high: float) -> NDArray[np.uint8]:
    """Edges (H, W) uint8, 255 on an edge and 0 elsewhere, of a picture (H, W, 3) or (H, W).

    A pixel whose strength (0 to 2040) is a maximum across its edge counts above `high`, and above `low` where it hangs
    together with one that does. Of colours each pixel's strongest channel counts.
    """
    low, high = math.floor(min(low, high)), math.floor(max(low, high))
    planes = pixels if pixels.ndim == 3 else pixels[:, :, None]
    dx, dy = _derivatives(planes.astype(np.int32))
    each = np.abs(dx) + np.abs(dy)
    best = each.argmax(2)[:, :, None]  # the first of equal ones
    dx, dy, strength = (np.take_along_axis(v, best, 2)[:, :, 0] for v in (dx, dy, each))
    crest = _maxima(dx, dy, strength) & (strength > low)
    return _connected(crest, crest & (strength > high)).astype(np.uint8) * np.uint8(255)


def _derivatives(planes: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Sobel's, across (H, W, C) and down."""
    p = np.pad(planes, ((1, 1), (1, 1), (0, 0)), mode="edge")
    down = p[:-2] + 2 * p[1:-1] + p[2:]
    across = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    return down[:, 2:] - down[:, :-2], across[2:] - across[:-2]


def _maxima(dx: NDArray[np.int32], dy: NDArray[np.int32], strength: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Where strength is a maximum along its gradient, rounded to eighths of a turn; of two equal ones one counts."""
    height, width = strength.shape
    padded = np.pad(strength, 1)

    def at(down: int, right: int) -> NDArray[np.int32]:
        return padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    x, y = np.abs(dx).astype(np.int64), np.abs(dy).astype(np.int64) << 15
    flat = y < x * _TAN
    steep = ~flat & (y > x * _TAN + (x << 16))
    falling = (dx ^ dy) < 0  # the gradient leads up and right, or down and left
    across = (strength > at(0, -1)) & (strength >= at(0, 1))
    down = (strength > at(-1, 0)) & (strength >= at(1, 0))
    one = (strength > at(-1, -1)) & (strength > at(1, 1))
    other = (strength > at(-1, 1)) & (strength > at(1, -1))
    return np.where(flat, across, np.where(steep, down, np.where(falling, other, one)))


def _connected(within: NDArray[np.bool_], start: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels of `within` that hang together with `start`, a part of it, by sides or corners."""
    number = np.cumsum(within).reshape(within.shape) - 1
    pairs = []
    for here, there in _NEIGHBOURS:
        both = within[here] & within[there]
        pairs.append((number[here][both], number[there][both]))
    one, other = (np.concatenate(side) for side in zip(*pairs, strict=True))
    group = np.arange(int(within.sum()))
    while (apart := group[one] != group[other]).any():
        one, other = one[apart], other[apart]
        least = np.minimum(group[one], group[other])
        np.minimum.at(group, group[one], least)
        np.minimum.at(group, group[other], least)
        while not np.array_equal(further := group[group], group):
            group = further
    chosen = np.zeros(len(group), bool)
    chosen[group[start[within]]] = True
    out = np.zeros_like(within)
    out[within] = chosen[group]
    return out
