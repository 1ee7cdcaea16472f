"""Retrieval: does a picture find its caption among candidates?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Retrieval:
    """`recall[k]`: share of pictures whose caption is among the k most similar; `chance[k]` the same for a guess."""

    recall: dict[int, float]
    chance: dict[int, float]
    count: int
    candidates: int


def retrieval(similarity: Tensor, ks: Sequence[int] = (1, 10), truth: Tensor | None = None) -> Retrieval:
    """R@k from similarities (pictures N, captions M); `truth` (N,) is the index of each picture's caption, else its own row.

    Ties count against the picture.
    """
    count, candidates = similarity.shape
    truth = torch.arange(count) if truth is None else truth
    own = similarity.gather(1, truth[:, None])
    better = (similarity >= own).sum(1) - 1  # its own caption is always counted once
    recall = {k: float((better < k).double().mean()) for k in ks}
    return Retrieval(recall, {k: min(1.0, k / candidates) for k in ks}, count, candidates)
