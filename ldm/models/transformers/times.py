"""Modulations of all steps of a sampling run at once: they depend on the time and on the pooled text alone.

A third of SD3's and FLUX.1's parameters make modulations, of one row for each picture: read at every step, they take as
long as the memory takes to give them. Legend: K distinct rows of conditioning, S times, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ldm.models.transformers.blocks import Modulation, TimeTextEmbedding

KNOWN_BYTES = 1 << 28
"""Up to this size modulations are kept: those of as many of the next steps as fit."""


class Times:
    """The times at which a network will be called, and its modulations there, made when the first is asked for."""

    def __init__(
        self,
        embedding: TimeTextEmbedding,
        layers: Sequence[Modulation],
        times: Sequence[float],
        limit: int,
        fetch: Callable[[nn.Module], None] = lambda _: None,
    ) -> None:
        """`fetch` is called with each layer before it is used."""
        self._embedding, self._layers, self._limit, self._fetch = embedding, layers, limit, fetch
        self._times = torch.tensor(list(times), dtype=torch.float32).tolist()
        self._kind: tuple[object, ...] = ()
        self._first = self._count = 0
        self._rows = torch.empty(0, 0)
        self._tables: list[Tensor] = []
        self.made = 0

    def of(self, t: Tensor, constant: Tensor) -> dict[nn.Module, Tensor] | None:
        """Each modulation's output (B, parts x D) at times t (B,) or (1,) for rows `constant` (B, D); None elsewhere.

        Elsewhere: while gradients are recorded or the network is compiled, at times that were not named or that
        differ within the batch, and where fewer than two steps fit.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not constant.numel():
            return None
        kind = (constant.dtype, constant.device, torch.is_autocast_enabled(constant.device.type), constant.shape[1])
        if kind != self._kind:
            self._kind, self._count, self._rows = kind, 0, constant[:0]
        same = (constant[:, None] == self._rows).all(-1)  # (B, K)
        told = torch.cat([t.reshape(-1).float(), same.any(1).float()]).tolist()  # waits for a device once
        moments, seen = told[: t.numel()], all(told[t.numel() :])
        if any(m != moments[0] for m in moments) or moments[0] not in self._times:
            return None
        place = self._times.index(moments[0])
        within = self._first <= place < self._first + self._count
        if not (seen and within):
            rows = constant if not within else torch.cat([self._rows, constant])
            if not self._make(place, torch.unique(rows, dim=0)):
                return None
            same = (constant[:, None] == self._rows).all(-1)
        if not same.any(1).all():  # not a number
            return None
        chosen = same.int().argmax(1) + (place - self._first) * len(self._rows)
        return {layer: table[chosen] for layer, table in zip(self._layers, self._tables, strict=True)}

    def _make(self, first: int, rows: Tensor) -> bool:
        """The tables from this time on; whether two times at least fit."""
        width = sum(layer.linear.out_features for layer in self._layers)
        fit = self._limit // (len(rows) * width * rows.element_size())
        times = self._times[first : first + fit]
        if len(times) < 2:
            return False
        self._tables.clear()  # before there are others
        t = torch.tensor(times, dtype=torch.float32, device=rows.device).repeat_interleave(len(rows))
        vectors = self._embedding(t, rows.repeat(len(times), 1))
        for layer in self._layers:
            self._fetch(layer)
            self._tables.append(layer.linear(vectors))
        self._first, self._count, self._rows = first, len(times), rows
        self.made += 1
        return True


@contextlib.contextmanager
def known_times(network: nn.Module, times: Sequence[float], limit: int = KNOWN_BYTES) -> Iterator[None]:
    """Inside, the network is called at these times (others are allowed) and its weights do not change.

    Its modulations are computed for many steps at once and kept in at most `limit` bytes, which are free afterwards.
    Networks without such modulations are left as they are.
    """
    timed = getattr(network, "timed", None)
    if timed is None:
        yield
        return
    before = network.known_times
    network.known_times = timed(times, limit)
    try:
        yield
    finally:
        network.known_times = before
