"""How well edges that were drawn follow edges that were asked for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def edge_agreement(drawn: Tensor, asked: Tensor, reach: int = 1) -> Tensor:
    """F1 score (B,) float64 in [0, 1] of edge maps (B, 1, H, W), an edge above 0.5; 1 where neither has one.

    Precision is the share of drawn edge pixels with an asked one at most `reach` pixels away along each side, recall
    the share of asked ones with a drawn one as near: edges one pixel wide seldom lie on the very same pixels.
    Raises ValueError for maps of different shapes.
    """
    if drawn.shape != asked.shape or drawn.ndim != 4 or drawn.shape[1] != 1:
        raise ValueError(f"edges: expected equal (B, 1, H, W), got {tuple(drawn.shape)} and {tuple(asked.shape)}")
    a, b = (drawn > 0.5).double(), (asked > 0.5).double()
    near_a, near_b = (functional.max_pool2d(x, 2 * reach + 1, 1, reach) for x in (a, b))
    count_a, count_b = a.sum((1, 2, 3)), b.sum((1, 2, 3))
    precision = (a * near_b).sum((1, 2, 3)) / count_a.clamp(min=1)
    recall = (b * near_a).sum((1, 2, 3)) / count_b.clamp(min=1)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    return torch.where((count_a + count_b) == 0, torch.ones_like(f1), f1)
