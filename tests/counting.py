"""A device that counts what is moved to it, and holds what was moved where it is freed with the last who uses it."""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch import Tensor

from ldm.models.moving import Arriving, Mover
from ldm.models.streaming import ALIGNED


class Counted(Mover):
    """Copies on the CPU whose memory is followed until it is freed; what is away is not a number, as is all made of it.

    With `hidden` False it can be read and written as usual. `now` and `most` count copies that are alive, also those
    that only autograd holds; `sizes` are of all fetched.
    """

    def __init__(self, hidden: bool = True) -> None:
        super().__init__(torch.device("cpu"))
        self.hidden = hidden
        self.sizes: list[int] = []
        self.now = self.most = self.bytes_now = self.bytes_most = self.waited = 0

    def fetch(self, host: Tensor) -> Arriving:
        size = host.numel()
        memory = np.empty(size + ALIGNED, np.uint8)
        weakref.finalize(memory, self._freed, size)
        self.sizes.append(size)
        self.now, self.bytes_now = self.now + 1, self.bytes_now + size
        self.most, self.bytes_most = max(self.most, self.now), max(self.bytes_most, self.bytes_now)
        first = -memory.ctypes.data % ALIGNED
        return Arriving(torch.from_numpy(memory)[first : first + size].copy_(host))

    def wait(self, arriving: Arriving) -> None:
        self.waited += 1

    def away(self, host: Tensor) -> Tensor:
        if not self.hidden:
            return host
        wrong = float("nan") if host.is_floating_point() else 77
        return torch.full((), wrong, dtype=host.dtype).expand(host.shape)

    def _freed(self, size: int) -> None:
        self.now, self.bytes_now = self.now - 1, self.bytes_now - size
