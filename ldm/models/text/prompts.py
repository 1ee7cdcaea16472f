"""Prompts with weighted words, and prompts longer than the encoders' context; both only where they are asked for.

Legend: B prompts, T tokens of the context, n chunks, D width of the states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ldm.models.text.base import TextEncoder
from ldm.models.text.clip import TextTower
from ldm.models.text.emphasis import parse, unread
from ldm.models.text.encoders import encode_texts, joined
from ldm.models.text.missing import MissingT5, NoTokenizer
from ldm.models.text.pretrained import PretrainedTokenizer
from ldm.models.text.t5 import T5Encoder
from ldm.models.text.tokenizer import Overlong, Tokenizer
from ldm.types import Cond

Token = tuple[int, float]
"""(id, weight)."""
AnyTokenizer = Tokenizer | PretrainedTokenizer | NoTokenizer


def pieces(prompt: str) -> list[tuple[str, float]]:
    """Text and weight of each part of a prompt: "a (red:1.3) apple" is "a ", "red" at 1.3 and " apple".

    The usual syntax, as `ldm.models.text.emphasis` reads it; BREAK only divides.
    """
    return [piece for section in parse(prompt).sections for piece in section]


def notes(prompts: Sequence[str], *, weighted: bool, long: bool) -> list[str]:
    """What to say of prompts before they are drawn: parts that are read otherwise than they may have been meant."""
    found: list[str] = []
    for prompt in dict.fromkeys(prompts):
        if not weighted:
            part = unread(prompt)
            says = "is read as words; weights=True (--prompt-weights) reads weights and names what else it is"
            found += [] if part is None else [f"prompt part {part!r} {says}"]
            continue
        parsed = parse(prompt)
        found += parsed.notes
        if len(parsed.sections) > 1 and not long:
            found.append("prompt part 'BREAK': left out; it begins a chunk with long=True (--long-prompts)")
    return list(dict.fromkeys(found))


def too_long(tokenizer: AnyTokenizer, prompts: Sequence[str], *, weighted: bool = False) -> list[Overlong]:
    """The prompts whose end does not fit into one context."""
    limit, found = tokenizer.limit, []
    for i, prompt in enumerate(prompts):
        ids = [token for section in _tokens(tokenizer, prompt, weighted) for token, _ in section]
        if len(ids) > limit:
            found.append(Overlong(i, len(ids), limit, tokenizer.decode(ids[limit:])))
    return found


def cut_off(encoders: Sequence[TextEncoder], prompts: Sequence[str], *, weighted: bool = False) -> list[Overlong]:
    """The prompts whose end no encoder sees: `too_long` for the encoder with the longest context."""
    told = [encoder.tokenizer for encoder in encoders if not isinstance(encoder, MissingT5)]
    return too_long(max(told, key=lambda tokenizer: tokenizer.limit), prompts, weighted=weighted)


def count_chunks(tokenizer: AnyTokenizer, prompts: Sequence[str], *, weighted: bool = False) -> int:
    """How many contexts the longest of the prompts fills, at least one; BREAK begins a new one (CLIP)."""
    if isinstance(tokenizer, Tokenizer):
        return max((len(_chunks(tokenizer, p, weighted)) for p in prompts), default=1)
    lengths = [sum(map(len, _tokens(tokenizer, p, weighted))) for p in prompts]
    return max((-(-length // tokenizer.limit) for length in lengths if length), default=1)


def encode_prompts(
    towers: Sequence[TextEncoder], prompts: Sequence[str], *, weighted: bool = False, chunks: int = 1
) -> Cond:
    """What `encode_texts` gives, of prompts whose tokens go into `chunks` contexts, one after the other.

    Each chunk is a text of its own with its markers; a prompt that ends early has empty ones. The states are
    (B, nT, D), the pooled vector is the first chunk's. `weighted` reads weights: the states of a part's tokens times
    its weight, all other states as they are. With one chunk all of the prompt goes into it. Without weights in a
    prompt, and one chunk, this is `encode_texts`.

    Only CLIP's towers have chunks: beside them T5 reads all of a prompt at once. Raises ValueError for a prompt that
    does not fit then, and for weights in a prompt for an encoder that cannot have them (Qwen3).
    """
    if chunks == 1 and not (weighted and any(w != 1 for p in prompts for _, w in pieces(p))):
        return encode_texts(towers, [_plain(p) for p in prompts] if weighted else prompts)
    conds = []
    for tower in towers:
        if isinstance(tower, TextTower):
            conds.append(_encode(tower, prompts, weighted, chunks))
        else:
            conds.append(_encode_whole(tower, prompts, weighted, chunks))
    return joined(towers, conds)


def _encode_whole(encoder: TextEncoder, prompts: Sequence[str], weighted: bool, chunks: int) -> Cond:
    """What an encoder without chunks gives."""
    weighted = weighted and any(w != 1 for p in prompts for _, w in pieces(p))
    if chunks > 1 and (lost := too_long(encoder.tokenizer, prompts, weighted=weighted)):
        raise ValueError(
            f"prompt of {lost[0].tokens} tokens: the {encoder.title} takes {lost[0].limit}, and long=True "
            "(--long-prompts) joins contexts of CLIP's text towers alone"
        )
    if not weighted or isinstance(encoder, MissingT5):
        return encoder([_plain(p) for p in prompts] if chunks > 1 else prompts)
    if not isinstance(encoder, T5Encoder):
        raise ValueError(
            f"weights=True (--prompt-weights): the {encoder.title} has no weighted words; CLIP's and T5 do"
        )
    tokenizer = encoder.tokenizer
    rows = [[t for section in _tokens(tokenizer, prompt, True) for t in section] for prompt in prompts]
    ids, mask = tokenizer.batch([tokenizer.framed([i for i, _ in row]) for row in rows])
    factors = torch.ones(ids.shape)
    for i, row in enumerate(rows):
        own = torch.tensor([w for _, w in row[: tokenizer.limit]])
        factors[i, : len(own)] = own
    cond = encoder.encode(ids, mask)
    return cond | {"text": cond["text"] * factors.to(cond["text"])[..., None]}


def _plain(prompt: str) -> str:
    """The words of a prompt without weights."""
    return " ".join("".join(text for text, _ in section) for section in parse(prompt).sections)


def _tokens(tokenizer: AnyTokenizer, prompt: str, weighted: bool) -> list[list[Token]]:
    """The tokens of each section between BREAKs."""
    sections = parse(prompt).sections if weighted else [[(prompt, 1.0)]]
    return [[(i, weight) for text, weight in section for i in tokenizer.encode(text)] for section in sections]


def _chunks(tokenizer: Tokenizer, prompt: str, weighted: bool) -> list[list[Token]]:
    """The tokens of each context, at least one."""
    limit, found = tokenizer.context - 2, []
    for section in _tokens(tokenizer, prompt, weighted):
        found += [section[k : k + limit] for k in range(0, max(len(section), 1), limit)]
    return found


def _encode(tower: TextTower, prompts: Sequence[str], weighted: bool, chunks: int) -> Cond:
    context, tokenizer = tower.context, tower.tokenizer
    pad = tokenizer.end if tokenizer.pad == "eot" else 0
    rows = torch.full((len(prompts), chunks, context), pad, dtype=torch.int64)
    factors = torch.ones(len(prompts), chunks, context)
    for i, prompt in enumerate(prompts):
        if chunks == 1:
            parts = [[t for section in _tokens(tokenizer, prompt, weighted) for t in section][: context - 2]]
        else:
            parts = _chunks(tokenizer, prompt, weighted)[:chunks]
        for j, own in enumerate(parts + [[]] * (chunks - len(parts))):
            rows[i, j, : len(own) + 2] = torch.tensor([tokenizer.start, *(t for t, _ in own), tokenizer.end])
            factors[i, j, 1 : len(own) + 1] = torch.tensor([w for _, w in own])
    cond = tower.encode(rows.flatten(0, 1))
    text = cond["text"] * factors.flatten(0, 1).to(cond["text"])[..., None]
    text = text.unflatten(0, (-1, chunks)).flatten(1, 2)
    out = {"text": text, "pooled": cond["pooled"].unflatten(0, (-1, chunks))[:, 0]}
    if tower.config.zero_empty:
        blank = [not (_plain(p) if weighted else p) for p in prompts]
        keep = ~torch.tensor(blank, device=text.device)
        out = {k: v * keep.view(-1, *[1] * (v.ndim - 1)) for k, v in out.items()}
    return out
