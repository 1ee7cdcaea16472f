"""Tensors of a transformer's own file beside the native ones that they hold: plans both ways from one list."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.checkpoint.maps import Part, Plan


@dataclass(frozen=True)
class Pair:
    """One tensor there, and the native ones that it holds, one after the other along the first axis.

    `rows` are theirs, needed where there are several. `swapped`: halves stand there as (shift, scale), here as
    (scale, shift), as in the modulation behind the last norm.
    """

    other: str
    natives: tuple[str, ...]
    rows: tuple[int, ...] = ()
    swapped: bool = False


def layer(
    other: str, *natives: str, rows: tuple[int, ...] = (), swapped: bool = False, bias: bool = True
) -> list[Pair]:
    """The weight and the bias of a layer there, and of those that it joins here."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [Pair(f"{other}.{kind}", tuple(f"{n}.{kind}" for n in natives), rows, swapped) for kind in kinds]


def to_authors(pairs: Iterable[Pair]) -> Plan:
    """Native names -> plan for the authors'."""
    return {p.other: Part(p.natives, swap if p.swapped else _join if len(p.natives) > 1 else None) for p in pairs}


def from_authors(pairs: Iterable[Pair]) -> Plan:
    """The authors' names -> plan for native ones."""
    plan: Plan = {}
    for pair in pairs:
        start, whole = 0, sum(pair.rows)
        for i, native in enumerate(pair.natives):
            if len(pair.natives) == 1:
                plan[native] = Part((pair.other,), swap if pair.swapped else None)
                continue
            end = start + pair.rows[i]
            plan[native] = Part((pair.other,), lambda x, a=start, b=end, n=whole: _rows(x, a, b, n))
            start = end
    return plan


def swap(x: Tensor) -> Tensor:
    """The halves along the first axis in the other order."""
    return torch.cat(x.chunk(2)[::-1])


def _join(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _rows(x: Tensor, start: int, end: int, whole: int) -> Tensor:
    if len(x) != whole:
        raise ValueError(f"a joined tensor has {len(x)} rows, {whole} expected")
    return x[start:end]
