"""Several data sets in one stream: each with its own captions, crops and loss weight, in exact shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ldm.data.loader import DataConfig, Loader, Tokenize, ahead
from ldm.data.order import Ints, mix, slots
from ldm.types import Batch


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set. Of every sum-of-shares positions `share` are its own; `weight` goes to the loss of its samples."""

    data: DataConfig
    share: int = 1
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.share < 1:
            raise ValueError(f"share must be at least 1, got {self.share}")
        if self.weight < 0:
            raise ValueError(f"weight must not be negative, got {self.weight}")
        if self.data.buckets:
            raise ValueError("a source of a mixture cannot have buckets: its batches would have several shapes")


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Sources that are mixed by position: as DreamBooth's instance and prior pictures, or a set and its favourites."""

    kind: Literal["mixture"] = "mixture"
    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources must not be empty")
        sizes = {s.data.size for s in self.sources if not s.data.cached}
        if len(sizes) > 1 or len({s.data.cached for s in self.sources}) > 1:
            raise ValueError("sources must agree on size and on cached, since a batch is one tensor")


class Mixture:
    """Like `Loader` over several sources. A position's source is fixed; each source goes through its epochs exactly.

    `steps_per_epoch` is the steps after which every source has been seen whole at least once.
    """

    def __init__(
        self,
        config: MixtureConfig,
        *,
        seed: int,
        micro_batch: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        tokenize: Tokenize | None = None,
        expect: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.global_batch = micro_batch * accumulate * world
        # Batches of one: a source's n-th sample is its order's n-th step, so no epoch has a partial batch.
        self.loaders = tuple(
            Loader(s.data, seed=seed + i, micro_batch=1, tokenize=tokenize, expect=expect)
            for i, s in enumerate(config.sources)
        )
        self._pattern, self._before = _pattern([s.share for s in config.sources], seed)
        self._micro_batch = micro_batch
        self._accumulate = accumulate
        self._rank = rank
        self._world = world
        self._workers = workers
        self._tokenize = tokenize

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps until the source that takes longest has been seen whole."""
        cycle = len(self._pattern)
        longest = max(
            -(-loader.order.steps_per_epoch * cycle // source.share)
            for loader, source in zip(self.loaders, self.config.sources, strict=True)
        )
        return -(-longest // self.global_batch)

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Micro-batches from an optimizer step on, forever."""
        micro = start_step * self._accumulate
        if self._workers == 0:
            while True:
                yield self.batch(*divmod(micro, self._accumulate))
                micro += 1
        with ThreadPoolExecutor(self._workers, "ldm-data") as pool:
            yield from ahead(pool, self._workers * 2, micro, lambda m: self.batch(*divmod(m, self._accumulate)))

    def batch(self, step: int, micro_step: int) -> Batch:
        """One micro-batch, a pure function of its place."""
        chosen = slots(
            self.global_batch, rank=self._rank, world=self._world, accumulate=self._accumulate, micro_step=micro_step
        )
        positions = step * self.global_batch + chosen
        source, number = self.places(positions)
        rows: list[tuple[int, Batch]] = []
        for k, loader in enumerate(self.loaders):
            mine = np.flatnonzero(source == k)
            if len(mine):
                ids = np.concatenate([loader.order.ids(int(n), np.zeros(1, np.int64)) for n in number[mine]])
                part = loader.assemble(ids.tolist(), positions[mine].tolist())
                part["weight"] = torch.full((len(mine),), self.config.sources[k].weight)
                rows += [(int(row), _row(part, i)) for i, row in enumerate(mine)]
        rows.sort(key=lambda r: r[0])
        return _join([row for _, row in rows])

    def places(self, positions: Ints) -> tuple[Ints, Ints]:
        """(source, number within the source) of global sample positions."""
        cycle, place = np.divmod(positions, len(self._pattern))
        source = self._pattern[place]
        shares = np.array([s.share for s in self.config.sources])
        return source, cycle * shares[source] + self._before[place]


def _pattern(shares: Sequence[int], seed: int) -> tuple[Ints, Ints]:
    """One cycle's sources, evenly spread, and how many of the same source come before each place of the cycle."""
    total = sum(shares)
    # Each source's places at (j + 1/2) / share of the cycle, ties broken by the seed: no source comes in clumps.
    points = [((j + 0.5) / share, int(mix(seed, k, j)[0]), k) for k, share in enumerate(shares) for j in range(share)]
    pattern = np.array([k for _, _, k in sorted(points)], np.int64)
    before = np.array([int((pattern[:i] == pattern[i]).sum()) for i in range(total)], np.int64)
    return pattern, before


def _row(batch: Batch, i: int) -> Batch:
    return {key: value[i : i + 1] for key, value in batch.items()}


def _join(rows: list[Batch]) -> Batch:
    joined: Batch = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        joined[key] = torch.cat(values) if isinstance(values[0], Tensor) else [v for part in values for v in part]
    return joined


def open_data(config: DataConfig | MixtureConfig, **options: Any) -> Loader | Mixture:
    """The loader of a config; options as `Loader` takes them."""
    return Mixture(config, **options) if isinstance(config, MixtureConfig) else Loader(config, **options)
