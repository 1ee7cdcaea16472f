"""What every data path gives: one rank's micro-batches, a pure function of step and micro-step."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import psutil
import torch
from torch import Tensor

from ldm.data.order import Ints, slots
from ldm.data.resized import Sizes
from ldm.types import Batch

Tokenize = Callable[[list[str]], Tensor]
"""Captions -> tokens (B, T)."""

Config = TypeVar("Config")


class Stream(ABC, Generic[Config]):
    """Micro-batches of one rank. Resume is `batches(optimizer steps done)`, whatever the world size was before.

    `workers` threads make batches ahead. `tokenize` maps a list of captions to tokens (B, T). `expect` names what a
    cached set must have been made with. Raises ValueError for what is out of range.
    """

    def __init__(
        self,
        config: Config,
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
        if micro_batch < 1 or accumulate < 1 or workers < 0 or not 0 <= rank < world:
            raise ValueError(
                f"micro_batch {micro_batch}, accumulate {accumulate}, workers {workers} or rank {rank} of {world} "
                "is out of range"
            )
        self.config = config
        self.global_batch = micro_batch * accumulate * world
        self._seed = seed
        self._micro_batch = micro_batch
        self._accumulate = accumulate
        self._rank = rank
        self._world = world
        self._workers = workers
        self._tokenize = tokenize
        self._expect = expect
        self.sizes = Sizes(((0, self.global_batch),))
        self._open()

    @abstractmethod
    def _open(self) -> None:
        """Find the samples and their order."""

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch, equal on all ranks."""

    @property
    @abstractmethod
    def kept_bytes(self) -> int:
        """Bytes of decoded samples held in memory."""

    @property
    @abstractmethod
    def bad(self) -> int:
        """How many different bad samples were met and replaced."""

    def follow(self, parts: Sequence[tuple[int, int]]) -> None:
        """Go on in a run that had other batch sizes before: (first step, batch) of each, this stream's own last.

        What was not read of the epoch comes next, each sample once; the place is counted in samples.
        """
        self.sizes = Sizes(tuple(parts))
        if self.sizes.parts[-1][1] != self.global_batch or self.sizes.parts[0][0] != 0:
            raise ValueError(f"batch sizes {list(parts)} do not begin at step 0 and end with {self.global_batch}")
        self._resize()

    @abstractmethod
    def _resize(self) -> None:
        """Follow `sizes`."""

    def figures(self) -> dict[str, float]:
        """What the log shall tell of this rank's data: memory that decoded samples take, and bad samples replaced.

        With it goes the process's resident memory, which would show what grows beside them, also where a GPU trains.
        """
        resident = psutil.Process().memory_info().rss
        return {
            "data_memory_gib": self.kept_bytes / 2**30,
            "host_memory_gib": resident / 2**30,
            "bad_samples": float(self.bad),
        }

    @abstractmethod
    def batch(self, step: int, micro_step: int) -> Batch:
        """One micro-batch, a pure function of its place."""

    def batches(self, start_step: int = 0, steps: int | None = None) -> Iterator[Batch]:
        """Micro-batches from an optimizer step on, `accumulate` a step; forever, or of so many steps and no more."""
        numbers = itertools.count(start_step * self._accumulate)
        if steps is not None:
            numbers = itertools.islice(numbers, steps * self._accumulate)
        make = lambda micro: self.batch(*divmod(micro, self._accumulate))  # noqa: E731
        if self._workers == 0:
            yield from map(make, numbers)
            return
        make_ahead = (lambda micro: pinned(make(micro))) if torch.cuda.is_available() else make
        with ThreadPoolExecutor(self._workers, "ldm-data") as pool:
            yield from _ahead(pool, self._workers * 2, numbers, make_ahead)

    def _slots(self, micro_step: int) -> Ints:
        """This rank's places in the global batch."""
        return slots(
            self.global_batch, rank=self._rank, world=self._world, accumulate=self._accumulate, micro_step=micro_step
        )


def pinned(batch: Batch) -> Batch:
    """With its tensors in memory from which a GPU copies while it computes; copied by the thread that calls it."""
    return {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}


def _ahead(
    pool: ThreadPoolExecutor, depth: int, numbers: Iterator[int], make: Callable[[int], Batch]
) -> Iterator[Batch]:
    """make(n) of each number in order, up to `depth` of them made beforehand."""
    waiting: deque[Future[Batch]] = deque()
    try:
        while True:
            waiting.extend(pool.submit(make, n) for n in itertools.islice(numbers, depth - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
