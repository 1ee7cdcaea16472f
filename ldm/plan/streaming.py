"""Frozen blocks that come and go: what is on the device, and what moves over PCIe (`engine.blocks_on_device`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ldm.models.streaming import ALIGNED, resident


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """Bytes of a network's blocks in their order, `places` of them on the device at once, the one that runs included.

    `resident` never leave; the others take turns in what is left: two places, where the next is fetched while one
    runs, or the only one.
    """

    blocks: tuple[float, ...]
    places: int
    resident: frozenset[int] = frozenset()

    @staticmethod
    def of(blocks: Sequence[float], places: int) -> Streamed:
        """As `ldm.models.streaming` divides them."""
        return Streamed(blocks=tuple(blocks), places=places, resident=frozenset(resident(len(blocks), places)))

    @property
    def moving(self) -> tuple[float, ...]:
        """Bytes of the blocks that take turns; of none where all stay."""
        return tuple(b for i, b in enumerate(self.blocks) if i not in self.resident)

    @property
    def ahead(self) -> bool:
        """Whether the next block is fetched while one runs."""
        return self.places > 1

    @property
    def held(self) -> float:
        """Bytes of blocks on the device at the fullest moment."""
        moving = self.moving
        stay = sum(self.blocks) - sum(moving)
        if not self.ahead:
            return stay + max(moving, default=0.0)
        return stay + max((a + b for a, b in pairwise(moving)), default=sum(moving))

    @property
    def host(self) -> float:
        """Bytes in the host's memory."""
        return sum(self.moving)

    def moved(self, *, backward: bool) -> float:
        """Bytes to the device in a call of the network; `backward`: in a forward and a backward pass.

        What is there where one pass turns into the next is not fetched again. Nothing is sent back: it is frozen.
        """
        moving = self.moving
        if not backward or not moving:
            return sum(moving)
        there = min(len(moving), 2 if self.ahead else 1)
        return sum(moving[there:]) + sum(moving[: len(moving) - there])


def aligned(tensors: Iterable[Tensor]) -> float:
    """Bytes of tensors that lie one after the other, each begun at a multiple of 256."""
    return float(sum(-(-t.numel() * t.element_size() // ALIGNED) * ALIGNED for t in tensors))


def waited(moved: float, rate: float, busy: float, ahead: bool) -> float:
    """Seconds that computing waits for bytes at a rate: those beyond `busy`, where they are fetched ahead."""
    return max(0.0, moved / rate - (busy if ahead else 0.0))


def halving(blocks: int) -> Iterator[int]:
    """Numbers of places to try, half as many each time, down to one."""
    while blocks > 1:
        blocks = (blocks + 1) // 2
        yield blocks
