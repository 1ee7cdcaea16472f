"""Caption retrieval: how often a picture's own caption is among the k that suit it best, of N candidates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.metrics.clip_score import ROUNDING, similarity
from ldm.rng import generator


@dataclass(frozen=True)
class Recall:
    """R@k with its Wilson 95 % interval over pictures, and the rate of a model that knows nothing."""

    k: int
    rate: float
    low: float
    high: float
    chance: float

    @property
    def times_chance(self) -> float:
        return self.rate / self.chance


@dataclass(frozen=True)
class Retrieval:
    """Recalls of one set of pictures, and how they were measured."""

    images: int
    captions: int
    candidates: int
    seed: int
    recalls: tuple[Recall, ...]

    def at(self, k: int) -> Recall:
        """R@k; ValueError if it was not measured."""
        for recall in self.recalls:
            if recall.k == k:
                return recall
        raise ValueError(f"R@{k} was not measured; have {[r.k for r in self.recalls]}")

    def record(self) -> dict[str, Any]:
        """Plain data for a result file."""
        recalls = {
            f"R@{r.k}": {
                "rate": r.rate,
                "interval_95": [r.low, r.high],
                "chance": r.chance,
                "times_chance": r.times_chance,
            }
            for r in self.recalls
        }
        return {
            "images": self.images,
            "captions": self.captions,
            "candidates": self.candidates,
            "candidate_seed": self.seed,
            **recalls,
        }


def recall_at(scores: Tensor, truth: Tensor, k: int, rounding: float | None = None) -> Tensor:
    """Chance (N,) that candidate `truth` (N,) is among the k highest `scores` (N, M) when ties are broken at random.

    So a model that gives every caption the same score has exactly k / M, whatever the processor: scores that differ by
    up to `rounding` are tied. None takes 16 eps of float32, which scores come from, times the row's largest score.
    Raises ValueError for scores that are not finite: they would win against all others.
    """
    if not scores.isfinite().all():
        raise ValueError("scores: some are not finite")
    own = scores.gather(1, truth[:, None])
    apart = scores.abs().amax(1, keepdim=True) * ROUNDING if rounding is None else rounding
    above = (scores > own + apart).sum(1)
    tied = ((scores - own).abs() <= apart).sum(1)
    return ((k - above) / tied).clamp(0, 1).double()


def caption_retrieval(
    images: Tensor,
    texts: Tensor,
    truth: Sequence[int],
    *,
    candidates: int = 64,
    ks: Sequence[int] = (1, 5, 10),
    seed: int = 0,
) -> Retrieval:
    """Retrieval of each picture's caption, row `truth[i]` of `texts`, among itself and `candidates - 1` others.

    `images` (N, D) and `texts` (M, D) are features; the texts must be of distinct captions. Each picture's candidates
    are drawn without replacement, by (seed, its index).
    Raises ValueError when there are fewer captions than candidates, or k is above their number.
    """
    if len(images) != len(truth) or not len(images):
        raise ValueError(
            f"truth: expected one caption for each of {len(images)} pictures (at least one), got {len(truth)}"
        )
    if not 2 <= candidates <= len(texts):
        raise ValueError(f"candidates: {candidates} is not between 2 and the number of distinct captions, {len(texts)}")
    if any(not 1 <= k <= candidates for k in ks):
        raise ValueError(f"ks: {list(ks)} must lie between 1 and the number of candidates, {candidates}")
    scores = similarity(images, texts)
    rows = torch.stack([_candidates(seed, i, int(t), len(texts), candidates) for i, t in enumerate(truth)])
    scores = scores.gather(1, rows)
    first = torch.zeros(len(images), dtype=torch.long)
    recalls = tuple(_recall(k, recall_at(scores, first, k, ROUNDING).sum().item(), len(images), candidates) for k in ks)
    return Retrieval(len(images), len(texts), candidates, seed, recalls)


def measure(
    encode_images: Callable[[Tensor], Tensor],
    encode_texts: Callable[[list[str]], Tensor],
    images: Tensor,
    captions: Sequence[str],
    pool: Sequence[str] = (),
    *,
    candidates: int = 64,
    ks: Sequence[int] = (1, 5, 10),
    seed: int = 0,
    batch: int = 64,
) -> Retrieval:
    """`caption_retrieval` of pictures (N, 3, H, W) in [-1, 1], given a CLIP's two encoders.

    Candidates come from the pictures' own captions and `pool`, without duplicates.
    """
    distinct = list(dict.fromkeys([*captions, *pool]))
    row = {caption: i for i, caption in enumerate(distinct)}
    with torch.no_grad():
        image_features = torch.cat([encode_images(images[i : i + batch]) for i in range(0, len(images), batch)])
        text_features = torch.cat([encode_texts(distinct[i : i + batch]) for i in range(0, len(distinct), batch)])
    truth = [row[caption] for caption in captions]
    return caption_retrieval(image_features, text_features, truth, candidates=candidates, ks=ks, seed=seed)


def _candidates(seed: int, index: int, truth: int, total: int, count: int) -> Tensor:
    """The truth first, then `count - 1` other rows."""
    others = torch.randperm(total - 1, generator=generator(seed, index, "candidates"))[: count - 1]
    return torch.cat([torch.tensor([truth]), others + (others >= truth)])


def _recall(k: int, hits: float, total: int, candidates: int) -> Recall:
    low, high = wilson(hits, total)
    return Recall(k, hits / total, low, high, k / candidates)


def wilson(hits: float, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Interval of a rate observed as `hits` of `total` (Wilson 1927); z = 1.96 covers 95 %."""
    rate, spread = hits / total, z * z / total
    centre = rate + spread / 2
    half = z * math.sqrt(rate * (1 - rate) / total + spread / (4 * total))
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))
