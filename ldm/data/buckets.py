"""Aspect-ratio buckets: which shapes there are, which picture goes where, and which bucket each step reads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from ldm.data.order import Ints, Order, mix, permute

Shape = tuple[int, int]
"""(width, height)."""


@dataclass(frozen=True, kw_only=True)
class BucketConfig:
    """Shapes whose sides are multiples of `step`, of at most `size` squared pixels, no longer than `ratio` to one.

    A bucket with fewer than `least` pictures is merged into the one of the nearest aspect.
    """

    size: int
    step: int = 64
    ratio: float = 2.0
    least: int = 64

    def __post_init__(self) -> None:
        if self.step < 1 or self.size < self.step or self.size % self.step:
            raise ValueError(f"bucket size {self.size} must be a positive multiple of the step {self.step}")
        if self.ratio < 1 or self.least < 1:
            raise ValueError(f"bucket ratio {self.ratio} and least {self.least} must be at least 1")

    def shapes(self) -> tuple[Shape, ...]:
        """All shapes, from tall to wide: each side as long as the pixels allow for the other."""
        found = set()
        for side in range(self.step, int(self.size * math.sqrt(self.ratio)) + self.step + 1, self.step):
            other = self.size * self.size // side // self.step * self.step
            if other and max(side, other) <= self.ratio * min(side, other):
                found |= {(side, other), (other, side)}
        return tuple(sorted(found, key=lambda s: (s[0] / s[1], s)))


def nearest(size: Shape, shapes: tuple[Shape, ...]) -> Shape:
    """The shape whose aspect is nearest in the logarithm; of equal ones the larger."""
    aspect = math.log(size[0] / size[1])
    return min(shapes, key=lambda s: (round(abs(math.log(s[0] / s[1]) - aspect), 9), -s[0] * s[1], s))


@dataclass(frozen=True)
class Assignment:
    """Which bucket each picture goes to, what was merged: {kept: {merged shape: pictures}}, and its own shape."""

    bucket: dict[str, Shape]
    merged: dict[Shape, dict[Shape, int]]
    wanted: dict[str, Shape]

    def report(self, kept: Collection[str] | None = None) -> dict[str, dict[str, object]]:
        """By bucket: pictures in all, and how many came from merged buckets; of the `kept` keys alone, if given."""
        keys = self.bucket if kept is None else [k for k in self.bucket if k in kept]
        counts = Counter(self.bucket[k] for k in keys)
        wanted = Counter((self.bucket[k], self.wanted[k]) for k in keys if self.wanted[k] != self.bucket[k])
        return {
            name(shape): {
                "pictures": counts[shape],
                "merged": {name(s): n for (to, s), n in sorted(wanted.items()) if to == shape},
            }
            for shape in sorted(counts)
        }


def name(shape: Shape) -> str:
    """WIDTHxHEIGHT."""
    return f"{shape[0]}x{shape[1]}"


def assign(sizes: Mapping[str, Shape], config: BucketConfig) -> Assignment:
    """The bucket of every picture by its size; no picture is lost."""
    shapes = config.shapes()
    wanted = {key: nearest(size, shapes) for key, size in sizes.items()}
    counts = Counter(wanted.values())
    goes = {shape: shape for shape in counts}
    merged: dict[Shape, dict[Shape, int]] = {}
    contents = {shape: {shape: n} for shape, n in counts.items()}
    while len(contents) > 1:
        smallest = min(contents, key=lambda s: (sum(contents[s].values()), s))
        if sum(contents[smallest].values()) >= config.least:
            break
        target = nearest(smallest, tuple(s for s in contents if s != smallest))
        for shape, n in contents.pop(smallest).items():
            contents[target][shape] = n
            goes[shape] = target
    for target, parts in contents.items():
        others = {shape: n for shape, n in parts.items() if shape != target}
        if others:
            merged[target] = others
    return Assignment({key: goes[shape] for key, shape in wanted.items()}, merged, wanted)


class BucketedOrder:
    """Global batches of one shape each: the buckets' own orders, their steps shuffled together anew each epoch."""

    def __init__(self, orders: Mapping[Shape, Order], seed: int, shuffle: bool = True) -> None:
        self.orders = tuple(orders.values())
        self._seed = seed
        self._shuffle = shuffle
        self._ends = np.cumsum([o.steps_per_epoch for o in self.orders])

    @property
    def steps_per_epoch(self) -> int:
        """Steps of all buckets."""
        return int(self._ends[-1])

    def turns(self, epoch: int) -> tuple[Ints, Ints]:
        """Of all steps of an epoch: which bucket's each is, and the number of its own step in the epoch."""
        place = np.arange(self.steps_per_epoch)
        if self._shuffle:
            place = permute(place, self.steps_per_epoch, mix(self._seed, epoch, -2))
        bucket = np.searchsorted(self._ends, place, side="right")
        first = self._ends - np.array([o.steps_per_epoch for o in self.orders])
        return bucket, place - first[bucket]

    def ids(self, step: int, slots: Ints) -> Ints:
        """Sample ids of the slots of a step; all of one bucket."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._shuffle:
            total = self.steps_per_epoch
            place = int(permute(np.array([place]), total, mix(self._seed, epoch, -2))[0])
        bucket = int(np.searchsorted(self._ends, place, side="right"))
        order = self.orders[bucket]
        local = place - (int(self._ends[bucket]) - order.steps_per_epoch)
        return order.ids(epoch * order.steps_per_epoch + local, slots)
