"""Where the pieces of trained parameters lie in the flat shards of ZeRO, and how those of one matrix come together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm import dist


@dataclass(frozen=True)
class Fragment:
    """The piece `[start, start + length)` of a flattened parameter whose master is `masters[flat][offset:]` here."""

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    flat: int
    offset: int


@dataclass(frozen=True)
class Cut:
    """A parameter that is whole on no rank: each rank's `(start, length)` of it, and who puts the pieces together.

    Its master is `masters[flat][offset:]` here.
    """

    shape: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    owner: int
    flat: int
    offset: int

    @property
    def here(self) -> slice:
        """This rank's piece of its master."""
        return slice(self.offset, self.offset + self.spans[dist.rank()][1])


Place = tuple[int, int, int]
"""Of a rank's piece of a parameter: its master, start and length; a length of 0 where it has none."""


def places(fragments: Sequence[Fragment], names: Sequence[str]) -> list[list[Place]]:
    """Of each parameter where every rank has its piece. Collective."""
    here = {f.name: f for f in fragments}
    mine = [(f.flat, f.start, f.length) if (f := here.get(name)) else (-1, 0, 0) for name in names]
    rows = torch.tensor(mine, device=dist.device())
    tables = [rows]
    if dist.world_size() > 1:
        tables = [torch.empty_like(rows) for _ in range(dist.world_size())]
        torch.distributed.all_gather(tables, rows)
    return [[(flat, start, length) for flat, start, length in row] for row in torch.stack(tables, dim=1).tolist()]


def cuts(fragments: Sequence[Fragment], shapes: Mapping[str, Sequence[int]], where: Sequence[list[Place]]) -> list[Cut]:
    """Of matrices of these shapes and places those that are cut, by their owners, who share the work among them."""
    offsets = {f.name: f.offset for f in fragments}
    loads, found = [0] * dist.world_size(), list[Cut]()
    for (name, shape), ranks in zip(shapes.items(), where, strict=True):
        numel = math.prod(shape)
        if any(length == numel for _, _, length in ranks):
            continue
        owner = loads.index(min(loads))
        loads[owner] += numel * min(shape[0], numel // shape[0])
        spans = tuple((start, length) for _, start, length in ranks)
        found.append(Cut(tuple(shape), spans, owner, max(flat for flat, _, _ in ranks), offsets.get(name, 0)))
    return sorted(found, key=lambda cut: cut.owner)


def gather(divided: Sequence[Cut], pieces: Sequence[Tensor]) -> list[Tensor]:
    """This rank's pieces of all -> the whole flat values of what it owns; `divided` is sorted by owner. Collective."""
    sent, received = _volumes(divided)
    got = _all_to_all(torch.cat(list(pieces)), sent, received)
    wholes = [got.new_empty(math.prod(cut.shape)) for cut in _owned(divided)]
    places = _places(divided, wholes)
    for place, piece in zip(places, got.split([len(place) for place in places]), strict=True):
        place.copy_(piece)
    return wholes


def scatter(divided: Sequence[Cut], wholes: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Undo `gather`; `like` has the values' dtype and device. Collective."""
    sent, received = _volumes(divided)
    got = _all_to_all(torch.cat([like.new_empty(0), *_places(divided, wholes)]), received, sent)
    return list(got.split([cut.spans[dist.rank()][1] for cut in divided]))


def _owned(divided: Sequence[Cut]) -> list[Cut]:
    return [cut for cut in divided if cut.owner == dist.rank()]


def _places(divided: Sequence[Cut], wholes: Sequence[Tensor]) -> list[Tensor]:
    """The pieces of whole values in the order in which they are received: by rank."""
    pairs = list(zip(_owned(divided), wholes, strict=True))
    spans = [(cut.spans[rank], whole) for rank in range(dist.world_size()) for cut, whole in pairs]
    return [whole[start : start + length] for (start, length), whole in spans]


def _volumes(divided: Sequence[Cut]) -> tuple[list[int], list[int]]:
    """How many values this rank sends to each and receives from each."""
    rank, ranks = dist.rank(), range(dist.world_size())
    sent = [sum(cut.spans[rank][1] for cut in divided if cut.owner == other) for other in ranks]
    return sent, [sum(cut.spans[other][1] for cut in _owned(divided)) for other in ranks]


def _all_to_all(values: Tensor, sent: list[int], received: list[int]) -> Tensor:
    got = values.new_empty(sum(received))
    torch.distributed.all_to_all_single(got, values, received, sent)
    return got
