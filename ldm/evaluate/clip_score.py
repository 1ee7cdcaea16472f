"""How well pictures fit their captions, on the features of any CLIP."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def similarity(images: Tensor, texts: Tensor) -> Tensor:
    """Cosines (N, M) of image features (N, D) and text features (M, D), float64."""
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        raise ValueError(f"features: expected (N, D) and (M, D), got {tuple(images.shape)} and {tuple(texts.shape)}")
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
    """Cosines and rows (N, count) of the bank's features (M, D) closest to each picture's (N, D), closest first."""
    if not 1 <= count <= len(bank):
        raise ValueError(f"count: {count} is not between 1 and the bank's size, {len(bank)}")
    found = torch.topk(similarity(images, bank), count, dim=1)
    return found.values, found.indices
