"""Several data sets in one stream: each with its own captions, crops, repeats and loss weight, in exact shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ldm.data.cache import any_length, as_long
from ldm.data.loader import DataConfig, Loader
from ldm.data.order import Ints, Order
from ldm.data.stream import Stream, Tokenize
from ldm.types import Batch


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set of a mixture.

    Of every sum-of-shares places `share` are its own; "size" for every source makes the shares their samples times
    `data.repeats`, so that an epoch has each once. `weight` goes to the loss of its samples, `name` (else the data
    set's) to the batch.
    """

    data: DataConfig
    share: int | Literal["size"] = 1
    weight: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.share, int) and self.share < 1:
            raise ValueError(f"share must be at least 1 or 'size', got {self.share}")
        if self.weight < 0:
            raise ValueError(f"weight must not be negative, got {self.weight}")


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Sources that are mixed by place: as DreamBooth's instance and prior pictures, or sets of several resolutions.

    `per`: with "sample" each global batch mixes the sources, which must agree on the shape; with "batch" each global
    batch is of one source, which may have its own size or buckets.
    """

    kind: Literal["mixture"] = "mixture"
    per: Literal["sample", "batch"] = "sample"
    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources must not be empty")
        if len({s.share == "size" for s in self.sources}) > 1:
            raise ValueError("share: 'size' is for all sources or none")
        if len({s.data.cached for s in self.sources}) > 1:
            raise ValueError("sources must agree on cached: a cache has no pictures")
        if self.per == "sample":
            if len({s.data.size for s in self.sources if not s.data.cached}) > 1:
                raise ValueError("sources must agree on size, since a batch is one tensor; or set per: batch")
            if any(s.data.buckets for s in self.sources):
                raise ValueError("a source with buckets has batches of several shapes; set per: batch")

    @property
    def cached(self) -> bool:
        """Whether the sources are caches."""
        return self.sources[0].data.cached


Data = DataConfig | MixtureConfig


class Mixture(Stream[MixtureConfig]):
    """The stream of several data sets. A place's source is fixed; each source goes through its epochs exactly.

    `steps_per_epoch` is the steps after which every source has been seen whole at least once.
    """

    def _open(self) -> None:
        self.loaders = tuple(self._loader(i, s) for i, s in enumerate(self.config.sources))
        # A loader of batches of one has as many steps as samples.
        sizes = [loader.steps_per_epoch for loader in self.loaders]
        shares = [n if s.share == "size" else s.share for s, n in zip(self.config.sources, sizes, strict=True)]
        divisor = int(np.gcd.reduce(shares))
        self.shares = tuple(s // divisor for s in shares)

    @property
    def _mixed(self) -> bool:
        return self.config.per == "sample"

    def _loader(self, number: int, source: Source) -> Loader:
        if self._mixed:
            # Batches of one: a source's n-th sample is its order's n-th step, so no epoch has a partial batch.
            return Loader(source.data, seed=self._seed + number, micro_batch=1, expect=self._expect)
        return Loader(
            source.data,
            seed=self._seed + number,
            micro_batch=self._micro_batch,
            accumulate=self._accumulate,
            rank=self._rank,
            world=self._world,
            expect=self._expect,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps until the source that takes longest has been seen whole."""
        total = sum(self.shares)
        pairs = zip(self.loaders, self.shares, strict=True)
        longest = max(-(-loader.steps_per_epoch * total // share) for loader, share in pairs)
        return -(-longest // self.global_batch) if self._mixed else longest

    @property
    def kept_bytes(self) -> int:
        """Bytes of decoded samples of all sources held in memory."""
        return sum(loader.kept_bytes for loader in self.loaders)

    @property
    def bad(self) -> int:
        """How many different bad samples were met in all sources."""
        return sum(loader.bad for loader in self.loaders)

    def batch(self, step: int, micro_step: int) -> Batch:
        """One micro-batch, a pure function of its place."""
        batch = self._mix(step, micro_step) if self._mixed else self._whole(step, micro_step)
        if self._tokenize is not None:
            batch["tokens"] = self._tokenize(batch["caption"])
        return batch

    def _whole(self, step: int, micro_step: int) -> Batch:
        source, number = divide(np.array([step]), self.shares)
        k = int(source[0])
        return self._label(k, self.loaders[k].batch_at(int(number[0]), micro_step, self.sizes.first(step)))

    def _resize(self) -> None:
        if self._mixed:  # places are samples whatever the batch
            return
        for k, loader in enumerate(self.loaders):
            own: list[tuple[int, int]] = []
            for step, batch in self.sizes.parts:
                first = _count(self.shares, k, step)
                own = [*(p for p in own if p[0] < first), (first, batch)]
            loader.follow(own)

    def _mix(self, step: int, micro_step: int) -> Batch:
        positions = self.sizes.first(step) + self._slots(micro_step)
        source, number = divide(positions, self.shares)
        rows, parts = [], []
        for k, loader in enumerate(self.loaders):
            mine = np.flatnonzero(source == k)
            if len(mine):
                rows.append(mine)
                part = loader.assemble(_ids(loader.order, number[mine]), positions[mine].tolist())
                parts.append(self._label(k, part))
        return _join(np.argsort(np.concatenate(rows)).tolist(), parts)

    def _label(self, number: int, part: Batch) -> Batch:
        source = self.config.sources[number]
        part["weight"] = torch.full((len(part["key"]),), source.weight)
        if source.name is not None:
            part["source"] = [source.name] * len(part["key"])
        return part


def divide(places: Ints, shares: Sequence[int]) -> tuple[Ints, Ints]:
    """(source, number within the source) of places (M,): exact in every sum-of-shares places, and evenly spread.

    Of the places that earlier sources left, source k has those where floor(place x share / rest) goes up.
    """
    rest = sum(shares)
    if rest >= 1 << 31:
        raise ValueError(f"shares: their sum {rest} is over 2^31 after division by what they have in common")
    cycle, left = np.divmod(places, rest)
    source = np.zeros_like(places)
    number = np.zeros_like(places)
    free = np.ones(places.shape, bool)
    for k, share in enumerate(shares):
        before = left * share // rest
        takes = free & ((left + 1) * share // rest > before)
        source[takes] = k
        number[takes] = cycle[takes] * share + before[takes]
        free &= ~takes
        left = left - before
        rest -= share
    return source, number


def _count(shares: Sequence[int], source: int, places: int) -> int:
    """How many of the first places are a source's."""
    cycles, rest = divmod(places, sum(shares))
    return cycles * shares[source] + int((divide(np.arange(rest), shares)[0] == source).sum())


def _ids(order: Any, numbers: Ints) -> list[int]:
    """The samples that come n-th in an order of batches of one."""
    assert isinstance(order, Order)
    epochs, line = np.divmod(numbers, order.total)
    out = np.empty_like(numbers)
    for epoch in np.unique(epochs):
        out[epochs == epoch] = order.at(int(epoch), line[epochs == epoch])
    return out.tolist()


def _join(rows: list[int], parts: list[Batch]) -> Batch:
    """The parts laid end to end, then taken in the order `rows`."""
    names = parts[0].keys()
    if other := next((p for p in parts if p.keys() != names), None):
        differ = sorted(names ^ other.keys())
        raise ValueError(f"sources {parts[0]['source'][0]!r} and {other['source'][0]!r}: only one of them has {differ}")
    joined: Batch = {}
    for name in names:
        values = [part[name] for part in parts]
        if isinstance(values[0], Tensor):
            values = as_long(values) if any_length(name, names, values[0].ndim) else values
            shapes = {tuple(v.shape[1:]) for v in values}
            if len(shapes) > 1:
                raise ValueError(f"sources must agree on the shape of {name}, got {sorted(shapes)}; or set per: batch")
            joined[name] = torch.cat(values)[rows]
        else:
            flat = [v for value in values for v in value]
            joined[name] = [flat[r] for r in rows]
    return joined


def open_data(
    config: Data,
    *,
    seed: int,
    micro_batch: int,
    accumulate: int = 1,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    tokenize: Tokenize | None = None,
    expect: Mapping[str, Any] | None = None,
) -> Loader | Mixture:
    """The stream of a config; arguments as `Stream` takes them."""
    kind = Mixture if isinstance(config, MixtureConfig) else Loader
    return kind(
        config,  # type: ignore[arg-type]
        seed=seed,
        micro_batch=micro_batch,
        accumulate=accumulate,
        rank=rank,
        world=world,
        workers=workers,
        tokenize=tokenize,
        expect=expect,
    )


def main_source(config: Data) -> DataConfig:
    """The data set itself, or a mixture's first: what validation reads."""
    return config.sources[0].data if isinstance(config, MixtureConfig) else config


def without_texts(config: Data) -> Data:
    """The config of pictures alone: no caption is opened, so that none can be wrong. Caches stay as they are."""
    if isinstance(config, DataConfig):
        return config if config.cached else replace(config, captions="none")
    data = [s.data if s.data.cached else replace(s.data, captions="none") for s in config.sources]
    return replace(config, sources=tuple(replace(s, data=d) for s, d in zip(config.sources, data, strict=True)))


def with_caches(config: Data, folder: Path, make: Callable[[DataConfig, Path], Path]) -> Data:
    """The config over caches: `make(data, folder)` gives a data set's own, a mixture's in folders by number."""
    if isinstance(config, DataConfig):
        return replace(config, path=str(make(config, folder)), cached=True)
    data = [replace(s.data, path=str(make(s.data, folder / str(i))), cached=True) for i, s in enumerate(config.sources)]
    return replace(config, sources=tuple(replace(s, data=d) for s, d in zip(config.sources, data, strict=True)))
