"""Frozen blocks that come and go: what is on the device, and what moves over PCIe (`engine.blocks_on_device`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ldm.models.frozen import held_bytes
from ldm.models.network import Network
from ldm.models.streaming import ALIGNED, resident


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """A frozen network: `total` bytes of it, and those of its blocks in their order, each tensor begun at a multiple of
    256. `places` of them are on the device at once, the one that runs included; None: all, and nothing moves.

    Some never leave (`models.streaming.resident`); the others take turns in what is left: two places, where the next is
    fetched while one runs, or the only one.
    """

    name: str
    total: float
    blocks: tuple[float, ...]
    exact: float
    places: int | None = None

    @staticmethod
    def of(network: Network, places: int | None, name: str | None = None) -> Streamed:
        """A network on the meta device, whose weights are as they will be."""
        blocks = [[t for t in (*block.parameters(), *block.buffers()) if t.numel()] for _, block in network.blocks()]
        return Streamed(
            name=name or network.component, total=float(held_bytes(network)), places=places,
            blocks=tuple(sum(map(_aligned, own)) for own in blocks),
            exact=sum(float(t.numel() * t.element_size()) for own in blocks for t in own),
        )  # fmt: skip

    @property
    def moving(self) -> tuple[float, ...]:
        """Bytes of the blocks that take turns; of none where all stay."""
        stay = set(resident(len(self.blocks), len(self.blocks) if self.places is None else self.places))
        return tuple(b for i, b in enumerate(self.blocks) if i not in stay)

    @property
    def ahead(self) -> bool:
        """Whether the next block is fetched while one runs."""
        return self.places != 1

    @property
    def held(self) -> float:
        """Bytes on the device at the fullest moment."""
        moving = self.moving
        if not moving:
            return self.total
        stay = self.total - self.exact + sum(self.blocks) - sum(moving)
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


def _aligned(t: Tensor) -> float:
    return float(-(-t.numel() * t.element_size() // ALIGNED) * ALIGNED)


def waited(moved: float, rate: float, busy: float, ahead: bool) -> float:
    """Seconds that computing waits for bytes at a rate: those beyond `busy`, where they are fetched ahead."""
    return max(0.0, moved / rate - (busy if ahead else 0.0))


def halving(blocks: int) -> Iterator[int]:
    """Numbers of places to try, half as many each time, down to one."""
    while blocks > 1:
        blocks = (blocks + 1) // 2
        yield blocks
