"""A model prompt by prompt: how well its pictures fit, how different they are, and how far all are from real ones."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.evaluate.clip_score import clip_score, similarity
from ldm.evaluate.cmmd import cmmd
from ldm.evaluate.diversity import Maps, diversity
from ldm.models.text import ClipConfig, build_tokenizer
from ldm.recipes.measure import resized


@dataclass(frozen=True)
class PromptFigures:
    """One prompt: mean CLIP score in [0, 100], share of pictures nearest to it among all prompts, mean distance."""

    prompt: str
    clip_score: float
    retrieved: float
    diversity: float | None


@torch.no_grad()
def clip_features(images: Tensor, clip: nn.Module, config: ClipConfig, batch: int = 64) -> Tensor:
    """Unit features (N, D) of pictures (N, 3, H, W) in [-1, 1]."""
    model: Any = clip
    parts = resized(images, config.image_size).split(batch)
    return torch.cat([model.encode_image(part, normalize=True).float() for part in parts])


@torch.no_grad()
def by_prompt(
    images: Tensor, prompts: Sequence[str], each: int, clip: nn.Module, config: ClipConfig, maps: Maps | None
) -> list[PromptFigures]:
    """A row a prompt; `images` holds `each` pictures of the first prompt, then of the second, and so on."""
    if len(images) != each * len(prompts):
        raise ValueError(f"expected {each} pictures of each of {len(prompts)} prompts, got {len(images)}")
    model: Any = clip
    texts = model.encode_text(build_tokenizer(config)(list(prompts)), normalize=True).float()
    features = clip_features(images, clip, config)
    scores = clip_score(features, texts.repeat_interleave(each, 0)).view(-1, each)
    found = similarity(features, texts).argmax(1).view(-1, each)
    rows = []
    for i, prompt in enumerate(prompts):
        own = images[i * each : (i + 1) * each]
        spread = diversity(own, maps) if maps is not None and each > 1 else None
        share = float((found[i] == i).double().mean())
        rows.append(PromptFigures(prompt, float(scores[i].mean()), share, spread))
    return rows


def summary(rows: Sequence[PromptFigures], images: Tensor, real: Tensor, clip: nn.Module, config: ClipConfig) -> Any:
    """Means over prompts, and CMMD of all pictures to real ones."""
    spreads = [r.diversity for r in rows if r.diversity is not None]
    return {
        "clip_score": sum(r.clip_score for r in rows) / len(rows),
        "retrieved": sum(r.retrieved for r in rows) / len(rows),
        "diversity": sum(spreads) / len(spreads) if spreads else None,
        "cmmd": cmmd(clip_features(real, clip, config), clip_features(images, clip, config)),
    }


def table(rows: Sequence[PromptFigures]) -> str:
    """The rows as CSV, the prompt that fits worst first."""
    out = io.StringIO()
    writer = csv.DictWriter(out, ["prompt", "clip_score", "retrieved", "diversity"], lineterminator="\n")
    writer.writeheader()
    for row in sorted(rows, key=lambda r: r.clip_score):
        writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in asdict(row).items()})
    return out.getvalue()
