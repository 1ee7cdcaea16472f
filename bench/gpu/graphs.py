"""A network's calls as CUDA graphs: captured at the first call of a shape, replayed at the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm.types import Cond

WARM = 3
"""Calls before a capture, in which libraries choose their kernels and take their memory."""
Call = Callable[[Tensor, Tensor, Cond], Tensor]


class Graphed:
    """`call(x, t, cond)` without gradients. What a graph is given is copied into its own memory, its answer out of it.

    On another device than CUDA the call itself, on the same copies.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._kept: dict[tuple[object, ...], tuple[Any, list[Tensor], Cond, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        values = [x, t, *(cond[key] for key in sorted(cond))]
        kind = (*sorted(cond), *((tuple(v.shape), v.stride(), v.dtype) for v in values))
        if kind not in self._kept:
            self._kept[kind] = self._capture(x, t, cond)
        graph, held, given, out = self._kept[kind]
        for own, value in zip(held, values, strict=True):
            own.copy_(value)
        if graph is None:
            return self._call(held[0], held[1], given)
        graph.replay()
        return out.clone()

    def _capture(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Any, list[Tensor], Cond, Tensor]:
        given = {key: cond[key].clone() for key in sorted(cond)}
        held = [x.clone(), t.clone(), *given.values()]
        if x.device.type != "cuda":
            return None, held, given, x
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                self._call(held[0], held[1], given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self._call(held[0], held[1], given)
        return graph, held, given, out
