"""Where the parts of a pipeline are: all on one device, or in the CPU's memory but for the one that is used.

Of the network also some blocks alone may be on the device (`models.streaming`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models import compiling, streaming
from ldm.models.network import Network
from ldm.types import Cond, Net

log = logging.getLogger(__name__)


class Placement:
    """Moves the parts that it is given; it keeps none of them."""

    def __init__(self, device: str | torch.device, dtype: torch.dtype) -> None:
        """`dtype` is what the network computes in, under autocast where its weights are of another type."""
        self._device, self._offload, self.dtype = torch.device(device), False, dtype

    def move(self, device: str | torch.device, network: Network, others: Sequence[nn.Module]) -> None:
        """All parts to a device; in half precision the network's convolutions take channels_last."""
        self._device, self._offload = torch.device(device), False
        streaming.stop(network)
        for module in (network, *others):
            module.to(device)
        network.to(memory_format=torch.contiguous_format if self.dtype == torch.float32 else torch.channels_last)

    def offload(self, device: str | torch.device, network: Network, others: Sequence[nn.Module]) -> None:
        """All parts to the CPU's memory; `used` brings each to `device`."""
        self.move("cpu", network, others)
        self._device = torch.device(device)
        self._offload = self._device.type != "cpu"
        if not self._offload:
            log.info("offload to the cpu: nothing to do, the model runs there")

    def stream(
        self, count: int, device: str | torch.device, network: Network, others: Sequence[nn.Module], *, offload: bool
    ) -> None:
        """`count` of the network's blocks on the device at once; the others offloaded, or all on the device."""
        streaming.check_count(count)
        self.offload(device, network, others)
        streaming.stream(network, count, self._device)
        for module in () if offload else others:
            module.to(self._device)
        self._offload = self._offload and offload

    @contextmanager
    def used(self, *parts: nn.Module) -> Iterator[None]:
        """The parts on the device inside, where they are offloaded."""
        moved = [part for part in parts if self._offload and not _streamed(part)]
        for part in moved:
            part.to(self._device)
        try:
            yield
        finally:
            for part in moved:
                part.to("cpu")

    def device_of(self, network: Network) -> torch.device:
        """Where the network runs."""
        return self._device if self._offload or _streamed(network) else next(network.parameters()).device

    @property
    def target(self) -> torch.device:
        """The device that was asked for last."""
        return self._device

    def autocast(self, network: Network) -> torch.autocast:
        """What the network runs in: nothing where its weights are of `dtype` themselves."""
        own = next(network.parameters()).dtype == self.dtype
        return torch.autocast(
            self.device_of(network).type, dtype=self.dtype, enabled=not own and self.dtype != torch.float32
        )


def _streamed(part: nn.Module) -> bool:
    return isinstance(part, Network) and part.streaming is not None


MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Of torch.compile."""


def compiled(network: Network, device: torch.device, mode: str | None) -> Net | None:
    """The network compiled whole at its first call for each shape; `mode` None takes CUDA graphs on a GPU.

    "blocks" compiles its blocks in place, and the network is called as before: None. Raises ValueError for other words.
    """
    if mode is not None and mode not in ("blocks", *MODES):
        raise ValueError(f"compile: {mode!r} is not one of {['blocks', *MODES]}")
    if mode == "blocks":
        compiling.by_block(network)
        return None
    if network.streaming is not None:
        raise ValueError(f"compile: {mode!r} compiles the network whole, whose blocks come and go; use 'blocks'")
    compiling.undo(network)
    graphs = "reduce-overhead" if device.type == "cuda" else "default"
    whole: Callable[..., Tensor] = torch.compile(network, fullgraph=True, mode=mode or graphs)

    def call(x: Tensor, t: Tensor, cond: Cond, **more: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return whole(x, t, cond, **more).clone()  # a graph writes its next answer over this one

    return call
