"""How different the pictures of one prompt are: the mean perceptual distance of their pairs."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.metrics.features import perceptual_distance

Maps = Callable[[Tensor], list[Tensor]]
"""Pictures (B, 3, H, W) in [-1, 1] -> feature maps of several depths."""


@torch.no_grad()
def diversity(images: Tensor, maps: Maps) -> float:
    """Mean over all pairs of pictures (N, 3, H, W) of `perceptual_distance`: LPIPS' form, on the network given.

    0 for equal pictures. It is LPIPS only on LPIPS' own network and weights. Raises ValueError for one picture.
    """
    if len(images) < 2:
        raise ValueError(f"diversity needs at least 2 pictures of a prompt, got {len(images)}")
    found = maps(images)
    first, second = zip(*itertools.combinations(range(len(images)), 2), strict=True)
    i, j = torch.tensor(first), torch.tensor(second)
    return float(perceptual_distance([m[i] for m in found], [m[j] for m in found]).double().mean())
