"""Another batch size in the middle of a run: every sample that the old order still had comes next, once.

The place is counted in samples. What is read stays the sequence of the first batch size's order, cut into other
batches; with buckets each bucket's own sequence is, and a bucket has its turn when the old order would have given it
as many samples as a new batch takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldm.data.buckets import BucketedOrder
from ldm.data.order import Ints, Order


@dataclass(frozen=True)
class Sizes:
    """The batch sizes of a run: (first step, batch) of each, by step; the first begins at step 0."""

    parts: tuple[tuple[int, int], ...]

    def first(self, step: int) -> int:
        """The place, in samples from the run's begin, of a step's first sample."""
        place = 0
        for (start, batch), end in zip(self.parts, [s for s, _ in self.parts[1:]] + [step], strict=True):
            if start > step:
                break
            place += (min(end, step) - start) * batch
        return place

    def changed(self, step: int, batch: int) -> Sizes:
        """With another batch from a step on."""
        kept = tuple(p for p in self.parts if p[0] < step)
        if kept and kept[-1][1] == batch:
            return Sizes(kept)
        return Sizes((*kept, (step, batch)))


class Resized:
    """The sequence of an order, in batches of other sizes."""

    def __init__(self, order: Order, sizes: Sizes) -> None:
        self._order, self._sizes = order, sizes

    @property
    def steps_per_epoch(self) -> int:
        """Of batches as large as the last."""
        return max(1, self._order.steps_per_epoch * self._order.batch // self._sizes.parts[-1][1])

    def ids(self, step: int, slots: Sequence[int] | Ints) -> Ints:
        """Sample ids (M,) of slots of a step's batch."""
        return at(self._order, self._sizes.first(step) + np.asarray(slots, np.int64))


def at(order: Order, places: Ints) -> Ints:
    """Sample ids (M,) at places counted in samples from the first step on."""
    steps, slots = np.divmod(places, order.batch)
    out = np.empty_like(places)
    for step in np.unique(steps):
        out[steps == step] = order.ids(int(step), slots[steps == step])
    return out


@dataclass(frozen=True)
class _Part:
    """From a step on batches of one size; `time`: steps of the old order that had come due, `taken`: samples (K,) of
    each bucket read before."""

    step: int
    batch: int
    time: int
    taken: Ints


class Regrouped:
    """Batches of other sizes out of an order of buckets, each of one bucket."""

    def __init__(self, order: BucketedOrder, sizes: Sizes) -> None:
        self._order, self._sizes = order, sizes
        self._batch = sizes.parts[0][1]
        self._own = np.array([o.steps_per_epoch for o in order.orders], np.int64)
        self._kept: dict[int, Any] = {}
        (_, first), *rest = sizes.parts
        self._parts = [_Part(0, first, 0, np.zeros(len(self._own), np.int64))]
        for step, batch in rest:
            time, taken = self._reached(step)
            self._parts.append(_Part(step, batch, time, taken))

    @property
    def steps_per_epoch(self) -> int:
        """Of batches as large as the last, up to rounding in each bucket."""
        return max(1, int((self._own * self._batch // self._parts[-1].batch).sum()))

    def ids(self, step: int, slots: Sequence[int] | Ints) -> Ints:
        """Sample ids (M,) of slots of a step's batch; all of one bucket."""
        bucket, first = self._batch_at(step)
        places = first + np.asarray(slots, np.int64)
        steps, rest = np.divmod(places, self._batch)
        order, out = self._order.orders[bucket], np.empty_like(places)
        for number in np.unique(steps):
            epoch, turn = divmod(int(number), int(self._own[bucket]))
            local = int(self._epoch(epoch)[1][bucket][turn])
            chosen = steps == number
            out[chosen] = order.ids(epoch * order.steps_per_epoch + local, rest[chosen])
        return out

    def _epoch(self, epoch: int) -> tuple[Ints, list[Ints]]:
        """The bucket of each of an epoch's steps, and each bucket's own steps in the order of their turns."""
        known = self._kept.get(epoch)
        if known is None:
            buckets, local = self._order.turns(epoch)
            known = (buckets, [local[buckets == k] for k in range(len(self._own))])
            for old in list(self._kept)[:-1]:  # threads near an epoch's end use two
                self._kept.pop(old, None)
            self._kept[epoch] = known
        return known

    def _due(self, time: int) -> Ints:
        """Samples (K,) that the old order gave of each bucket before its step `time`."""
        epoch, rest = divmod(time, int(self._own.sum()))
        counts = np.bincount(self._epoch(epoch)[0][:rest], minlength=len(self._own)) if rest else 0
        return (self._own * epoch + counts) * self._batch

    def _part(self, step: int) -> _Part:
        return next(p for p in reversed(self._parts) if p.step <= step)

    def _batch_at(self, step: int) -> tuple[int, int]:
        """The bucket of a step and the place of its first sample in the bucket's sequence."""
        part = self._part(step)
        given = step - part.step
        time = self._time_of(part, given)
        waiting = (self._due(time) - part.taken) // part.batch
        if time > part.time:  # the bucket of the old step that has just come due; of no other there can be more
            epoch, place = divmod(time - 1, int(self._own.sum()))
            bucket = int(self._epoch(epoch)[0][place])
        else:  # what the change itself made due
            ends = np.cumsum(waiting)
            bucket = int(np.searchsorted(ends, given, side="right"))
            return bucket, int(part.taken[bucket] + (given - (ends[bucket] - waiting[bucket])) * part.batch)
        before = (self._due(time - 1) - part.taken) // part.batch
        return bucket, int(part.taken[bucket] + (before[bucket] + given - before.sum()) * part.batch)

    def _time_of(self, part: _Part, number: int) -> int:
        """The fewest old steps after which more than `number` batches of a part are due."""

        def batches(time: int) -> int:
            return int(((self._due(time) - part.taken) // part.batch).sum())

        low, total = part.time, int(self._own.sum())
        if batches(low) > number:
            return low
        epoch = low // total + 1
        while batches(epoch * total) <= number:  # whole epochs are counted without looking into them
            low, epoch = epoch * total, epoch + 1 + (epoch * total - part.time) // total
        high = epoch * total
        while high - low > total:
            middle = (low // total + epoch) // 2 * total
            if middle <= low:
                break
            low, high = (low, middle) if batches(middle) > number else (middle, high)
            epoch = high // total
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if batches(middle) > number else (middle, high)
        return high

    def _reached(self, step: int) -> tuple[int, Ints]:
        """Old steps that were due, and samples read of each bucket, when a step begins."""
        part = self._part(step)
        if step == part.step:
            return part.time, part.taken
        bucket, first = self._batch_at(step - 1)
        time = self._time_of(part, step - 1 - part.step)
        taken = part.taken.copy()
        if time > part.time:
            taken += (self._due(time - 1) - part.taken) // part.batch * part.batch
        else:
            waiting = (self._due(time) - part.taken) // part.batch
            taken[:bucket] += waiting[:bucket] * part.batch
        taken[bucket] = first + part.batch
        return time, taken
