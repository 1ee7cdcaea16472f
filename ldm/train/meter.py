"""How a run spends its time: operations counted, the machine's peak, waiting for data, each rank's own time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from ldm import dist
from ldm.models import onednn
from ldm.train.log import memory
from ldm.types import Batch


class _Counted(TorchDispatchMode):
    """Adds up the operations of what runs inside: 2 a multiply-add."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self._formulas = flop_registry | {k: shape_wrapper(v) for k, v in onednn.formulas().items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


class StepFlops:
    """Operations of a step on one rank, counted in its first forward: that of everything, and twice that of `trained`
    again for its backward. A forward that is repeated to save memory does not count."""

    def __init__(self, trained: nn.Module) -> None:
        self._trained = trained
        self.total = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around the forward of one micro-batch."""
        inside, began, depth = 0, 0, 0

        def before(module: nn.Module, args: Any) -> None:
            nonlocal began, depth
            began, depth = (counted.flops if depth == 0 else began), depth + 1

        def after(module: nn.Module, args: Any, out: Any) -> None:
            nonlocal inside, depth
            depth -= 1
            inside += counted.flops - began if depth == 0 else 0

        hooks = [self._trained.register_forward_pre_hook(before), self._trained.register_forward_hook(after)]
        try:
            with _Counted() as counted:
                yield
        finally:
            for hook in hooks:
                hook.remove()
        self.total = counted.flops + 2 * (inside or counted.flops)


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of a few square matrix products on one device."""
    side, best = (8192 if device.type == "cuda" else 512), 0.0
    a = torch.ones(side, side, device=device, dtype=dtype)
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        onednn.product(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return best


class Meter:
    """This rank's own seconds since the last `read`: waiting for data, and the forward, before it waits for others.

    On a GPU the forward is timed by events, which nothing waits for until `read`.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._data = self._forward = 0.0
        self._steps = 0
        self._events: list[tuple[Any, Any]] = []

    def next(self, batches: Iterator[Batch]) -> Batch:
        """The next micro-batch."""
        began = time.perf_counter()
        batch = next(batches)
        self._data += time.perf_counter() - began
        return batch

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward."""
        if self._cuda:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            yield
            pair[1].record()
            self._events.append(pair)
            return
        began = time.perf_counter()
        yield
        self._forward += time.perf_counter() - began

    def step(self) -> None:
        """A step is over."""
        self._steps += 1

    def read(self) -> list[list[float]]:
        """For each rank its own seconds per step, those of waiting for data, and its memory in GiB; collective."""
        for first, second in self._events:
            second.synchronize()
            self._forward += first.elapsed_time(second) / 1e3
        steps = max(self._steps, 1)
        mine = [(self._data + self._forward) / steps, self._data / steps, memory()]
        self._data, self._forward, self._steps, self._events = 0.0, 0.0, 0, []
        return dist.gather(torch.tensor([mine], dtype=torch.float32, device=dist.device())).tolist()
