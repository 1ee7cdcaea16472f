"""Randomness keyed by (seed, global sample position, purpose): the same for any world size, worker or micro-batch."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def key(seed: int, position: int, purpose: str) -> int:
    """63-bit key of one random draw; neighbouring seeds and positions give unrelated keys.

    Any whole number is a seed of its own, negative ones and those beyond 64 bits too: no two are the same.
    """
    place = struct.pack("<q", position)
    digest = hashlib.blake2b(_bytes(seed) + place + purpose.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _bytes(seed: int) -> bytes:
    """Eight bytes for seeds of 64 bits with their sign; behind a mark and their length for those beyond."""
    if -(1 << 63) <= seed < 1 << 63:
        return struct.pack("<q", seed)
    length = seed.bit_length() // 8 + 1
    return b"wide" + struct.pack("<q", length) + seed.to_bytes(length, "little", signed=True)


def seed_torch(seed: int) -> None:
    """Seed torch's own generator, which takes 64 bits: those as they are, any other whole number by its key."""
    torch.manual_seed(seed if -(1 << 63) <= seed < 1 << 64 else key(seed, 0, "torch"))


def generator(seed: int, position: int, purpose: str) -> torch.Generator:
    """A CPU generator that belongs to one sample and one purpose."""
    return torch.Generator().manual_seed(key(seed, position, purpose))


@dataclass(frozen=True)
class Rng:
    """The randomness of one micro-batch: row i belongs to the sample at global position `positions[i]`.

    Draws are made on the CPU in float32, so that devices and batch sizes agree.
    """

    seed: int
    positions: tuple[int, ...]

    @staticmethod
    def of(seed: int, positions: Tensor | Sequence[int]) -> Rng:
        """From a tensor or sequence of global sample positions (B,)."""
        values = positions.tolist() if isinstance(positions, Tensor) else positions
        return Rng(seed, tuple(int(p) for p in values))

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal (B, *shape)."""
        rows = [torch.randn(*shape, generator=generator(self.seed, p, purpose)) for p in self.positions]
        return torch.stack(rows)

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform in [0, 1), (B, *shape)."""
        rows = [torch.rand(tuple(shape), generator=generator(self.seed, p, purpose)) for p in self.positions]
        return torch.stack(rows)

    def __len__(self) -> int:
        return len(self.positions)
