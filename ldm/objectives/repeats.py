"""One encoded sample used several times in a micro-batch, each time with a time and noise of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.rng import Rng
from ldm.types import Cond

MOST = 256
_STRIDE = 1 << 44
"""Between the positions that key a sample's repetitions: beyond the samples that a run sees, and exact in float64."""


def rng_of(rng: Rng, count: int) -> Rng:
    """The randomness of all samples, then of all a second time, and so on; the first time as without repetitions."""
    if count == 1:
        return rng
    return Rng(rng.seed, tuple(p + i * _STRIDE for i in range(count) for p in rng.positions))


def rows_of(rows: Tensor, count: int) -> Tensor:
    """Rows (B, ...) as often, (count * B, ...), in the order of `rng_of`."""
    return rows if count == 1 else rows.repeat(count, *[1] * (rows.ndim - 1))


def cond_of(cond: Cond, count: int) -> Cond:
    """Conditioning as often."""
    return cond if count == 1 else {name: rows_of(value, count) for name, value in cond.items()}


def stratified(u: Tensor, count: int) -> Tensor:
    """Uniform u (count * B,), the i-th time of each sample moved into [i / count, (i + 1) / count): still uniform."""
    if count == 1:
        return u
    part = torch.arange(count, device=u.device, dtype=torch.float64)[:, None]
    return ((u.double().view(count, -1) + part) / count).flatten().to(u.dtype).clamp(max=1 - 2**-24)
