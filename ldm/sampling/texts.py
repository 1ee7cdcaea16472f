"""Which keys of a conditioning are its text, and texts of different lengths side by side.

Legend: B batch, T tokens, D features. Keys of encoders that are not joined have their place behind a point: "text.1".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ldm.types import Cond

_SEQUENCES = ("text", "kv", "context")
"""(B, T, D): the states of tokens, or what a network's `prepared` made of them."""
_WHOLE = ("vector", "pooled")
"""(B, D): of a text as a whole."""


def is_text(key: str) -> bool:
    """Whether a key is part of what is told of a prompt, and nothing else (sizes, conditions, guidance).

    A picture that is a prompt ("image_kv.N") enters where the text does.
    """
    return key.partition(".")[0] in ("text", "pooled", "mask", "image_kv") or key in (*_SEQUENCES, *_WHOLE)


def encoder_of(key: str) -> int:
    """The place of the encoder that a text's key belongs to; 0 without one."""
    number = key.partition(".")[2]
    return int(number) if number.isdigit() else 0


def is_sequence(key: str) -> bool:
    """Whether a text's key has an axis of tokens, after the batch's."""
    return key.partition(".")[0] in (*_SEQUENCES, "mask")


def mask_of(key: str) -> str:
    """The key of the mask of a text's states: "mask.1" of "text.1"."""
    name, point, place = key.partition(".")
    return "mask" + point + place if name in _SEQUENCES else key


def padded(conds: Sequence[Cond]) -> list[Cond]:
    """The conditionings with equally many tokens: the shorter get zeros at their end, which their masks leave out.

    Where one has a mask (B, T) and another's text has none, that one's is 1 everywhere. Raises ValueError for texts of
    different lengths without masks: padding would be attended to.
    """
    out = [dict(cond) for cond in conds]
    masks = {key for cond in conds for key in cond if key.partition(".")[0] == "mask"}
    kinds = {key: cond[key].dtype for cond in conds for key in cond if key in masks}
    for cond in out:
        for key in [k for k in cond if is_sequence(k) and mask_of(k) in masks and mask_of(k) not in cond]:
            cond[mask_of(key)] = cond[key].new_ones(cond[key].shape[:2], dtype=kinds[mask_of(key)])
    for key in sorted({key for cond in out for key in cond if is_sequence(key)}):
        lengths = sorted({cond[key].shape[1] for cond in out if key in cond})
        if len(lengths) < 2:
            continue
        if mask_of(key) not in masks:
            raise ValueError(f"cond {key!r} has texts of {lengths[0]} and {lengths[-1]} tokens and no {mask_of(key)!r}")
        for cond in out:
            if key in cond:
                cond[key] = lengthened(cond[key], lengths[-1])
    return out


def trimmed(cond: Cond) -> Cond:
    """Without the tokens at the end that the masks leave out for every row, but for one; whole without memory."""
    out = dict(cond)
    for key in [
        k for k in cond if k.partition(".")[0] == "mask" and not cond[k].is_meta
    ]:  # a plan's masks hold nothing
        seen = cond[key].bool().any(0).nonzero()
        length = int(seen.max()) + 1 if len(seen) else 1
        out |= {k: v[:, :length] for k, v in cond.items() if is_sequence(k) and mask_of(k) == key}
    return out


def lengthened(value: Tensor, tokens: int) -> Tensor:
    """(B, T, ...) with zeros after its tokens up to so many; as it is where it has more."""
    missing = tokens - value.shape[1]
    if missing <= 0:
        return value
    sides = [0, 0] * (value.dim() - 2) + [0, missing]
    if value.dtype == torch.bool:
        return functional.pad(value.to(torch.uint8), sides).bool()
    return functional.pad(value, sides)
