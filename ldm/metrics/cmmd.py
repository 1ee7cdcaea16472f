"""CMMD: maximum mean discrepancy of CLIP features (Jayasumana et al. 2024, arXiv 2401.09603)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ldm.metrics.fid import without_rounding

SIGMA, SCALE = 10.0, 1000.0


def cmmd(real: Tensor, other: Tensor, *, sigma: float = SIGMA, part: int = 1024) -> float:
    """1000 times the squared discrepancy of features (N, D), (M, D) under exp(-|x - y|^2 / 2 sigma^2).

    Features are scaled to unit length. The estimate is the published one, which keeps each picture's pair with itself.
    It is never below 0, and what is nothing but rounding is 0. Figures of different CLIPs do not compare. Raises
    ValueError for empty sets or different widths.
    """
    for x in (real, other):
        if x.ndim != 2 or not len(x):
            raise ValueError(f"features: expected (N, D) with N at least 1, got {tuple(x.shape)}")
    if real.shape[1] != other.shape[1]:
        raise ValueError(f"features: widths differ, {real.shape[1]} and {other.shape[1]}: not of the same CLIP?")
    a, b = functional.normalize(real.double(), dim=1), functional.normalize(other.double(), dim=1)

    def mean(x: Tensor, y: Tensor) -> float:
        sums = [torch.exp(-torch.cdist(rows, y).square() / (2 * sigma**2)).sum().item() for rows in x.split(part)]
        return sum(sums) / (len(x) * len(y))

    within, between = mean(a, a) + mean(b, b), 2 * mean(a, b)
    return SCALE * max(0.0, without_rounding(within - between, within + between))
