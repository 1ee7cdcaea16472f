"""Prompts with weighted words, and prompts longer than the towers' context; both only where they are asked for.

Legend: B prompts, T tokens of the context, n chunks, D width of the states.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.models.text import TextTower, Tokenizer, encode_texts
from ldm.types import Cond

_WEIGHTED = re.compile(r"\(([^():]+):\s*([0-9]*\.?[0-9]+)\s*\)")


def pieces(prompt: str) -> list[tuple[str, float]]:
    """Text and weight of each part of a prompt: "a (red:1.3) apple" is "a ", "red" at 1.3 and " apple".

    Any other parenthesis is text.
    """
    found, at = [], 0
    for match in _WEIGHTED.finditer(prompt):
        found += [(prompt[at : match.start()], 1.0), (match[1], float(match[2]))]
        at = match.end()
    return [(text, weight) for text, weight in [*found, (prompt[at:], 1.0)] if text.strip()]


def count_chunks(tokenizer: Tokenizer, prompts: Sequence[str], *, weighted: bool = False) -> int:
    """How many contexts the longest of the prompts fills, at least one."""
    longest = max((len(_ids(tokenizer, p, weighted)[0]) for p in prompts), default=0)
    return max(1, -(-longest // (tokenizer.context - 2)))


def encode_prompts(
    towers: Sequence[TextTower], prompts: Sequence[str], *, weighted: bool = False, chunks: int = 1
) -> Cond:
    """{"text": (B, nT, D), "pooled": (B, P)} of prompts whose tokens go into `chunks` contexts, one after the other.

    Each chunk is a text of its own with its markers; a prompt that ends early has empty ones. The pooled vector is the
    first chunk's. `weighted` reads "(word:1.3)": the states of its tokens times the weight, and then all of the
    prompt's so that their mean is what it was. Without weights in a prompt, and one chunk, this is `encode_texts`.
    """
    if chunks == 1 and not (weighted and any(w != 1 for p in prompts for _, w in pieces(p))):
        return encode_texts(towers, ["".join(t for t, _ in pieces(p)) for p in prompts] if weighted else prompts)
    conds = [_encode(tower, prompts, weighted, chunks) for tower in towers]
    return {"text": torch.cat([c["text"] for c in conds], dim=-1), "pooled": conds[-1]["pooled"]}


def _ids(tokenizer: Tokenizer, prompt: str, weighted: bool) -> tuple[list[int], list[float]]:
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in pieces(prompt) if weighted else [(prompt, 1.0)]:
        own = tokenizer.encode(text)
        ids += own
        weights += [weight] * len(own)
    return ids, weights


def _encode(tower: TextTower, prompts: Sequence[str], weighted: bool, chunks: int) -> Cond:
    context, tokenizer = tower.context, tower.tokenizer
    pad = tokenizer.end if tokenizer.pad == "eot" else 0
    rows = torch.full((len(prompts), chunks, context), pad, dtype=torch.int64)
    factors = torch.ones(len(prompts), chunks, context)
    for i, prompt in enumerate(prompts):
        ids, weights = _ids(tokenizer, prompt, weighted)
        for j in range(chunks):
            part = slice(j * (context - 2), (j + 1) * (context - 2))
            own = ids[part]
            rows[i, j, : len(own) + 2] = torch.tensor([tokenizer.start, *own, tokenizer.end])
            factors[i, j, 1 : len(own) + 1] = torch.tensor(weights[part])
    cond = tower.encode(rows.flatten(0, 1))
    text = _weighted(cond["text"].unflatten(0, (-1, chunks)).flatten(1, 2), factors.flatten(1))
    out = {"text": text, "pooled": cond["pooled"].unflatten(0, (-1, chunks))[:, 0]}
    if tower.config.zero_empty:
        keep = torch.tensor([p != "" for p in prompts], device=text.device)
        out = {k: v * keep.view(-1, *[1] * (v.ndim - 1)) for k, v in out.items()}
    return out


def _weighted(text: Tensor, factors: Tensor) -> Tensor:
    """States (B, nT, D) times factors (B, nT); rows whose factors are all 1 stay bit by bit."""
    factors = factors.to(text)
    scaled = text * factors[..., None]
    scaled = scaled * (text.mean((1, 2), keepdim=True) / scaled.mean((1, 2), keepdim=True))
    return torch.where((factors == 1).all(1)[:, None, None], text, scaled)
