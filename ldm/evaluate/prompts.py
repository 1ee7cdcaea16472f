"""A model prompt by prompt: how well its pictures fit, how different they are, and how far all are from real ones."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.evaluate.divided import Rows
from ldm.evaluate.measure import clip_features
from ldm.metrics.clip_score import ROUNDING, clip_score, similarity
from ldm.metrics.cmmd import cmmd
from ldm.metrics.diversity import Maps, diversity
from ldm.metrics.retrieval import recall_at
from ldm.models.text.openclip import AnyClip, tokenizer_of


@dataclass(frozen=True)
class PromptFigures:
    """One prompt: mean CLIP score in [0, 100], share of pictures nearest to it among all prompts, mean distance."""

    prompt: str
    clip_score: float
    retrieved: float
    diversity: float | None


def described(images: Tensor, each: int, clip: nn.Module, config: AnyClip, maps: Maps | None) -> Rows:
    """What `figures` needs of the pictures of whole prompts, `each` of one and then of the next."""
    spreads = [
        diversity(own, maps) if maps is not None and each > 1 else float("nan") for own in images.split(each)
    ]  # fmt: skip
    return {
        "clip": clip_features(images, clip, config),
        "diversity": torch.tensor(spreads, dtype=torch.float64).repeat_interleave(each)[: len(images)],
    }


@torch.no_grad()
def figures(rows: Rows, prompts: Sequence[str], each: int, clip: nn.Module, config: AnyClip) -> list[PromptFigures]:
    """A row a prompt, from what `described` gave of the pictures of all."""
    model: Any = clip
    tokens = tokenizer_of(config)(list(prompts)).to(next(clip.parameters()).device)
    texts = model.encode_text(tokens, normalize=True).float().cpu()
    features, spreads = rows["clip"], rows["diversity"].view(-1, each)[:, 0].tolist()
    scores = clip_score(features, texts.repeat_interleave(each, 0)).view(-1, each)
    truth = torch.arange(len(prompts)).repeat_interleave(each)
    found = recall_at(similarity(features, texts), truth, 1, ROUNDING).view(-1, each)
    made = []
    for i, prompt in enumerate(prompts):
        share = float(found[i].mean())
        spread = None if math.isnan(spreads[i]) else spreads[i]
        made.append(PromptFigures(prompt, float(scores[i].mean()), share, spread))
    return made


def by_prompt(
    images: Tensor, prompts: Sequence[str], each: int, clip: nn.Module, config: AnyClip, maps: Maps | None
) -> list[PromptFigures]:
    """A row a prompt; `images` holds `each` pictures of the first prompt, then of the second, and so on."""
    if len(images) != each * len(prompts):
        raise ValueError(f"expected {each} pictures of each of {len(prompts)} prompts, got {len(images)}")
    return figures(described(images, each, clip, config, maps), prompts, each, clip, config)


def summary(rows: Sequence[PromptFigures], features: Tensor, real: Tensor) -> dict[str, Any]:
    """Means over prompts, and CMMD of the pictures' CLIP features (N, D) to those of real ones (M, D)."""
    spreads = [r.diversity for r in rows if r.diversity is not None]
    return {
        "clip_score": sum(r.clip_score for r in rows) / len(rows),
        "retrieved": sum(r.retrieved for r in rows) / len(rows),
        "diversity": sum(spreads) / len(spreads) if spreads else None,
        "cmmd": cmmd(real, features),
    }


def table(rows: Sequence[PromptFigures], each: int) -> str:
    """The rows as CSV, the prompt that fits worst first; `each` is of how many pictures a row's figures are."""
    out = io.StringIO()
    writer = csv.DictWriter(out, ["prompt", "clip_score", "retrieved", "diversity", "pictures"], lineterminator="\n")
    writer.writeheader()
    for row in sorted(rows, key=lambda r: r.clip_score):
        told = {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in asdict(row).items()}
        writer.writerow(told | {"pictures": each})
    return out.getvalue()
