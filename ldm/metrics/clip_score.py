"""How well pictures fit their captions, on the features of any CLIP."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

ROUNDING = 16 * torch.finfo(torch.float32).eps
"""Cosines of float32 features that differ by less are equal: an input's differ by so much from batch to batch and from
processor to processor. Those of the CLIP here move by 0.6 eps; deeper towers round more often."""


def similarity(images: Tensor, texts: Tensor) -> Tensor:
    """Cosines (N, M) of image features (N, D) and text features (M, D), float64. ValueError if some are not finite."""
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        raise ValueError(f"features: expected (N, D) and (M, D), got {tuple(images.shape)} and {tuple(texts.shape)}")
    if not (images.isfinite().all() and texts.isfinite().all()):
        raise ValueError("features: some are not finite")
    return functional.normalize(images.double(), dim=1) @ functional.normalize(texts.double(), dim=1).T


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """CLIP score (N,) in [0, 100] of N pictures and their captions, both as features (N, D).

    100 · max(cos, 0): Hessel et al. 2021 with w = 100. Figures of different CLIPs do not compare.
    """
    if images.shape != texts.shape:
        raise ValueError(f"features: expected equal shapes, got {tuple(images.shape)} and {tuple(texts.shape)}")
    cosine = functional.cosine_similarity(images.double(), texts.double(), dim=1)
    return 100 * cosine.clamp(min=0)


def nearest(images: Tensor, bank: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Cosines and rows (N, count) of the bank's features (M, D) closest to each picture's (N, D), closest first.

    Of features that are equal within rounding the one of the lowest row comes first.
    """
    if not 1 <= count <= len(bank):
        raise ValueError(f"count: {count} is not between 1 and the bank's size, {len(bank)}")
    left = similarity(images, bank)
    cosines = left.clone()
    rows = []
    for _ in range(count):
        level = left >= left.amax(1, keepdim=True) - ROUNDING
        rows.append(level.int().argmax(1, keepdim=True))  # the first of them
        left = left.scatter(1, rows[-1], -math.inf)
    chosen = torch.cat(rows, 1)
    return cosines.gather(1, chosen), chosen
