"""Layers as the authors of a family have them: which of ours each of them is, and its rows cut apart and joined.

The authors keep query, key and value (and in FLUX.1's single blocks the feed-forward too) in one layer, and two halves
of the last modulations the other way round than diffusers and we do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.adapters.corrections import Correction, Difference, Hadamard, Rotation, Rows
from ldm.adapters.low_rank import Lora, LowRank

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Layer:
    """One layer of the authors': our layers whose rows it has one after another.

    `rows` counts them where there are several layers; `swapped`: its two halves are the other way round.
    """

    parts: tuple[str, ...]
    rows: tuple[int, ...] = ()
    swapped: bool = False

    def spans(self, rows: int) -> list[Spans]:
        """For each part the rows of the whole that are its own, in its order; `rows` are those of the whole."""
        if self.swapped:
            return [((rows // 2, rows), (0, rows // 2))]
        if len(self.parts) == 1:
            return [((0, rows),)]
        ends = [sum(self.rows[: i + 1]) for i in range(len(self.rows))]
        return [((stop - count, stop),) for count, stop in zip(self.rows, ends, strict=True)]

    @property
    def plain(self) -> bool:
        """Whether it is one of ours as it is."""
        return len(self.parts) == 1 and not self.swapped


Table = dict[str, Layer]
"""The authors' names of a network's layers -> what they are here."""


def one(ours: str, *, swapped: bool = False) -> Layer:
    """A layer that is a single one here."""
    return Layer((ours,), (), swapped)


def several(prefix: str, names: Sequence[str], rows: Sequence[int]) -> Layer:
    """A layer whose rows are those of `prefix` and each of the names."""
    return Layer(tuple(prefix + n for n in names), tuple(rows))


def under(start: str, ours: str, layers: Mapping[str, str | Layer]) -> Table:
    """The table of one block: `start` before the authors' names, `ours` before our own."""
    found = {}
    for name, layer in layers.items():
        layer = one(layer) if isinstance(layer, str) else layer
        found[start + name] = replace(layer, parts=tuple(ours + p for p in layer.parts))
    return found


def rows_of(low: Correction, spans: Spans) -> Correction:
    """The correction of some rows of a layer. Raises ValueError for magnitudes by column, which need all rows."""
    count, whole = low.shape[0], sum(stop - start for start, stop in spans)
    if low.axis == 1 and low.magnitude is not None and whole != count:
        raise ValueError("magnitudes by input column of a layer that is several here are not known")

    def take(rows: Tensor) -> Tensor:
        return torch.cat([rows[start:stop] for start, stop in spans])

    magnitude = low.magnitude if low.magnitude is None or low.axis == 1 else take(low.magnitude)
    if isinstance(low, LowRank):
        cut = replace(low, up=take(low.up), magnitude=magnitude)
        return cut if whole == count else _narrowed(cut)
    if isinstance(low, Hadamard):
        form = (whole, *low.form[1:])
        return replace(low, a1=take(low.a1), a2=take(low.a2), form=form, magnitude=magnitude)
    if isinstance(low, Difference):
        return replace(low, value=take(low.value), magnitude=magnitude)
    if isinstance(low, Rotation):
        return _turned(low, spans, whole)
    plain = replace(low, magnitude=None, axis=0)  # type: ignore[type-var]
    return Rows(plain, spans, magnitude, low.axis)


def _turned(low: Rotation, spans: Spans, whole: int) -> Rotation:
    """The rotation of some rows. Raises ValueError where a block is of several layers."""
    form = (whole, *low.form[1:])
    if low.inputs:
        return replace(low, form=form)
    side = low.skew.shape[1]
    if any(start % side or stop % side for start, stop in spans):
        raise ValueError(f"blocks of {side} outputs reach over layers that are apart here ({spans[0]}): not known")
    skew = torch.cat([low.skew[start // side : stop // side] for start, stop in spans])
    rescale = None if low.rescale is None else torch.cat([low.rescale[start:stop] for start, stop in spans])
    return replace(low, skew=skew, form=form, rescale=rescale)


def _narrowed(low: LowRank) -> LowRank:
    """The same without the ranks that these rows do not use, as in the blocks of a joined file."""
    used = low.up.flatten(2).abs().amax((0, 2)) > 0 if low.up.ndim > 2 else low.up.abs().amax(0) > 0
    count = int(used.sum())
    if count in (0, low.rank):
        return low
    return replace(low, down=low.down[used], up=low.up[:, used], alpha=low.scale * count)


def joined(lora: Lora, layer: Layer) -> LowRank:
    """The authors' layer's correction, of plain ones of some of its parts; their names are those of `layer.parts`.

    Where all have one `down`, this is it; otherwise the ranks stand beside each other and `up` is of blocks. Raises
    ValueError for parts with other numbers of rows.
    """
    here = [lora.get(p) for p in layer.parts]
    given = [low for low in here if low is not None]
    first = given[0]
    if layer.plain:
        return first
    if layer.swapped:
        up = torch.cat([first.up[start:stop] for start, stop in layer.spans(len(first.up))[0]])
        return replace(first, up=up)
    for name, low, rows in zip(layer.parts, here, layer.rows, strict=True):
        if low is not None and len(low.up) != rows:
            raise ValueError(f"{name} has {len(low.up)} outputs, the model's layer has {rows}")
    shared = all(low.rank == first.rank and torch.equal(low.down, first.down) for low in given)
    rank = first.rank if shared else sum(low.rank for low in given)
    up = first.up.new_zeros(sum(layer.rows), rank)
    row = column = 0
    for low, rows in zip(here, layer.rows, strict=True):
        if low is not None:
            at = 0 if shared else column
            up[row : row + rows, at : at + low.rank] = low.up.flatten(1) * (low.scale / first.scale)
            column += low.rank
        row += rows
    down = first.down if shared else torch.cat([low.down for low in given])
    return LowRank(down, up, first.scale * rank)
