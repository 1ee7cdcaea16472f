"""Bytes between the host's memory and a device: at once on the CPU, on a stream of their own on CUDA."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)
PAGE = 4096
"""Bytes of a page of memory, or a multiple of it."""


@dataclass(frozen=True)
class Arriving:
    """Bytes on a device, which may be used by what is asked of it after `Mover.wait`."""

    flat: Tensor
    done: Any = None


class Mover:
    """Copies to a device, each at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def host(self, count: int) -> Tensor:
        """So many bytes of the host's memory, (count,) uint8."""
        return torch.empty(count, dtype=torch.uint8)

    def fetch(self, host: Tensor) -> Arriving:
        """A copy on the device."""
        return Arriving(torch.empty(host.shape, dtype=host.dtype, device=self.device).copy_(host))

    def wait(self, arriving: Arriving) -> None:
        """What is asked of the device from now on runs after the copy."""

    def away(self, host: Tensor) -> Tensor:
        """What stands for weights while they are not on the device: those in the host's memory."""
        return host

    def finish(self) -> None:
        """Wait for all copies."""


class CudaMover(Mover):
    """Copies from pinned memory beside the computing; the host never waits for the device.

    Memory is taken and given back on the stream that computes. A copy waits for all that was asked of that stream
    before: what it writes over may be in use until then. It runs beside what is asked after it.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream: Any = torch.cuda.Stream(device)

    def host(self, count: int) -> Tensor:
        return _pinned(count)

    def fetch(self, host: Tensor) -> Arriving:
        flat = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            flat.copy_(host, non_blocking=True)
            return Arriving(flat, self._stream.record_event())

    def wait(self, arriving: Arriving) -> None:
        torch.cuda.current_stream(self.device).wait_event(arriving.done)

    def finish(self) -> None:
        self._stream.synchronize()


def mover(device: torch.device) -> Mover:
    """The one for a device."""
    return CudaMover(device) if device.type == "cuda" else Mover(device)


def _pinned(count: int) -> Tensor:
    """Pinned memory of this size; torch's own allocator rounds sizes up to powers of two, up to twice the memory.

    It has its pages alone, as they are pinned whole.
    """
    pages = -(-count // PAGE) * PAGE
    array = torch.empty(pages + PAGE, dtype=torch.uint8).numpy()
    memory = torch.from_numpy(array)
    memory = memory[-memory.data_ptr() % PAGE :][:count]
    runtime: Any = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(memory.data_ptr(), pages, 0)) != 0:
        log.warning("%d bytes of the host's memory could not be pinned where they are; torch pins more for them", count)
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)
    # The tensors made of it hold the array: it goes, and this is called, after the last of them.
    weakref.finalize(array, _unpin, memory.data_ptr()).atexit = False
    return memory


def _unpin(address: int) -> None:
    runtime: Any = torch.cuda.cudart()
    torch.cuda.synchronize()  # a copy from it may be under way
    runtime.cudaHostUnregister(address)
