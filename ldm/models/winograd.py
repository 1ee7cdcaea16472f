"""Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray 2016, arXiv 1509.09308): 16 products where 36 would be.

It pays on CPUs for wide layers whose weights are transformed once for many calls, as in sampling.

Legend: B batch, C input channels, K output channels, H, W pixels, P tiles of 2 x 2 pixels of the whole batch.
"""

from __future__ import annotations

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models import onednn

_FILTER = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
WIDE, TILES = 640 * 320, 32
"""Below so many weights of a tap, or so few tiles, the transforms cost more than the products save (docs/log.md)."""


class Transforms:
    """Transformed weights, made at their first use and kept for later calls while they fit.

    It knows weights by identity: use one while they do not change, and drop it afterwards.
    """

    def __init__(self, budget: int | None = None) -> None:
        """`budget` in bytes; by default a quarter of the machine's memory."""
        self._left = psutil.virtual_memory().total // 4 if budget is None else budget
        self._weights: dict[int, Tensor | None] = {}

    def of(self, weight: Tensor) -> Tensor | None:
        """(16, K, C) for (K, C, 3, 3), or None where there is no room for it."""
        if id(weight) not in self._weights:
            size = weight.numel() * 16 // 9 * weight.element_size()
            fits = size <= self._left
            self._left -= size * fits
            self._weights[id(weight)] = transformed(weight) if fits else None
        return self._weights[id(weight)]


def pays(x: Tensor, cout: int) -> bool:
    """Whether a convolution of x (B, C, H, W) to `cout` channels is quicker this way, with weights at hand."""
    b, c, h, w = x.shape
    return c * cout >= WIDE and min(c, cout) >= 320 and b * h * w >= 4 * TILES and h % 2 == 0 and w % 2 == 0


def transformed(weight: Tensor) -> Tensor:
    """Weights (K, C, 3, 3) -> (16, K, C): G g G^T of each (eq. 6)."""
    g = weight.new_tensor(_FILTER)
    both = torch.einsum("ai,bj->ijab", g, g).reshape(9, 16)
    return (weight.flatten(2) @ both).permute(2, 0, 1).contiguous()


def convolve(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """The 3x3 convolution, padded by 1, of x (B, C, H, W) with even sides by `transformed` weights -> (B, K, H, W)."""
    b, _, h, w = x.shape
    products = onednn.product(weights, _tiles(x)).view(4, 4, -1, b, h // 2, w // 2)
    rows = (products[0] + products[1]).add_(products[2]), (products[1] - products[2]).sub_(products[3])
    out = x.new_empty(b, products.shape[2], h // 2, 2, w // 2, 2)
    for i, row in enumerate(rows):
        for j, found in enumerate(((row[0] + row[1]).add_(row[2]), (row[1] - row[2]).sub_(row[3]))):
            if bias is not None:
                found += bias[:, None, None, None]
            out[:, :, :, i, :, j] = found.transpose(0, 1)
    return out.view(b, -1, h, w)


def _tiles(x: Tensor) -> Tensor:
    """B^T d B of all overlapping tiles d of 4 x 4 pixels, (16, C, P)."""
    b, c, h, w = x.shape
    padded = F.pad(x, (1, 1, 1, 1))
    found = x.new_empty(4, 4, c, b, h // 2, w // 2)
    for i, row in enumerate(_filtered(padded, 2)):
        for j, tile in enumerate(_filtered(row, 3)):
            found[i, j] = tile.transpose(0, 1)
    return found.view(16, c, -1)


def _filtered(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """B^T d along one padded axis, for the four places in every tile."""
    count = x.shape[dim] - 3
    a, b, c, d = (x.narrow(dim, k, count) for k in range(4))
    step = (*[slice(None)] * dim, slice(None, None, 2))
    a, b, c, d = (v[step] for v in (a, b, c, d))
    return a - c, b + c, c - b, b - d
