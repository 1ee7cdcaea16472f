"""ZeRO 0, 1 and 2 of a network that one bucket holds, on CPUs: gradients are reduced at once after the backward pass.

DeepSpeed takes each gradient when it is ready: a hook in Python, a copy into the bucket, one out of it, one into each
owner's slice and back, so that what is ready is sent while the backward pass goes on. With a single bucket nothing is
sent before its end, and in small networks those hooks and copies are longer than the sending. Here gradients are
concatenated once, in the order of their owners, and each owner's part is a view of that. Same sums, same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from ldm import dist
from ldm.train.engine_config import EngineConfig


def fits(config: EngineConfig, numel: int) -> bool:
    """Whether a network of so many trained weights is reduced here: by the config and its size alone, on all ranks."""
    plain = config.precision != "fp16" and not config.offload_optimizer
    return dist.world_size() > 1 and config.zero_stage < 3 and plain and numel <= config.bucket


def squares(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of squares of float32 tensors; no tensor is copied to float64, which would take longer than Adam."""
    if not gradients:
        return torch.zeros((), device=dist.device())
    return torch.stack(torch._foreach_norm(list(gradients))).double().square().sum().float()


class Whole:
    """Stage 0: every rank has the mean of all gradients."""

    def __init__(self, engine: Any, params: Sequence[Tensor]) -> None:
        engine.enable_backward_allreduce = False
        self._params = [p for p in params if p.numel()]
        self._sizes = [p.numel() for p in self._params]

    @torch.no_grad()
    def reduce(self, boundary: bool) -> None:
        """After a micro-batch; gradients are local until the last."""
        if not boundary:
            return
        flat = torch.cat([_flat(p) for p in self._params])
        torch.distributed.all_reduce(flat)
        flat.mul_(1.0 / dist.world_size())
        for p, mean in zip(self._params, flat.split(self._sizes), strict=True):
            p.grad = mean.view(p.shape)


@dataclass(frozen=True)
class _Piece:
    """Elements `[start, stop)` of a flattened parameter; of none: so many zeros, where partitions are padded."""

    param: int | None
    start: int
    stop: int
    whole: bool


class Divided:
    """Stages 1 and 2: every rank has the mean of the gradients whose masters it holds, and makes the step with them."""

    def __init__(self, engine: Any, stage: int) -> None:
        engine.enable_backward_allreduce = False
        self._optimizer, self._stage = engine.optimizer, stage
        self._rank, self._world = dist.rank(), dist.world_size()
        for hook in self._optimizer._grad_acc_hooks:
            hook.remove()
        self._optimizer._grad_acc_hooks.clear()
        self._optimizer.step = self.step
        self._params: list[Tensor] = [p for group in self._optimizer.bit16_groups for p in group]
        self._sizes = [int(size) for size in self._optimizer.partition_size]  # by group, the same on every rank
        pieces = [self._pieces(rank) for rank in range(self._world)]
        self._order = [piece for groups in pieces for group in groups for piece in group]
        self._own = [[piece.stop - piece.start for piece in group] for group in pieces[self._rank]]
        self._shard: Tensor | None = None

    def _pieces(self, rank: int) -> list[list[_Piece]]:
        """What a rank's partition of each group is made of, in order."""
        found, index = [], 0
        for group, size in zip(self._optimizer.bit16_groups, self._sizes, strict=True):
            first, at, pieces = rank * size, 0, []
            for p in group:
                start, stop = max(first - at, 0), min(first + size - at, p.numel())
                if start < stop:
                    pieces.append(_Piece(index, start, stop, stop - start == p.numel()))
                at, index = at + p.numel(), index + 1
            if padding := size - sum(piece.stop - piece.start for piece in pieces):
                pieces.append(_Piece(None, 0, padding, True))
            found.append(pieces)
        return found

    @torch.no_grad()
    def reduce(self, boundary: bool) -> None:
        """After a micro-batch: at stage 1 gradients are whole and local until the last, at stage 2 never."""
        if self._stage == 1 and not boundary:
            return
        flats = [_flat(p) for p in self._params]
        for p in self._params:
            p.grad = None
        flat = torch.cat([self._piece(flats, piece) for piece in self._order])
        del flats
        flat.div_(self._world)
        parts = flat.chunk(self._world)
        # At once: on two ranks each link carries one part each way.
        works = [torch.distributed.reduce(part, owner, async_op=True) for owner, part in enumerate(parts)]
        for work in works:
            work.wait()  # type: ignore[union-attr]
        own = parts[self._rank]
        if self._shard is None:
            # Without accumulation it stays a view for the moment to the step, with it the others' parts are let go.
            self._shard = own if boundary else own.clone()
        else:
            self._shard.add_(own)

    def _piece(self, flats: Sequence[Tensor], piece: _Piece) -> Tensor:
        if piece.param is None:
            return self._params[0].new_zeros(piece.stop)
        flat = flats[piece.param]
        return flat if piece.whole else flat[piece.start : piece.stop]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """In place of DeepSpeed's: clip, update the own masters, gather weights; nothing if the norm is not finite."""
        optimizer = self._optimizer
        shard, self._shard = self._shard, None
        assert shard is not None
        parts = shard.split(self._sizes)
        totals = torch.stack([squares(part.split(sizes)) for part, sizes in zip(parts, self._own, strict=True)])
        torch.distributed.all_reduce(totals)
        norm = torch.linalg.vector_norm(totals.sqrt())
        optimizer.overflow = not bool(norm.isfinite())
        optimizer._global_grad_norm = float("inf") if optimizer.overflow else norm
        if optimizer.overflow:
            return
        groups = zip(optimizer.single_partition_of_fp32_groups, parts, self._weights, strict=True)
        for i, (master, gradient, weights) in enumerate(groups):
            optimizer.unscale_and_clip_grads([gradient], norm)
            master.grad = gradient
            optimizer._optimizer_step(i)
            master.grad = None
            weights[self._rank].copy_(master)
        self._gather()

    @property
    def _weights(self) -> list[list[Tensor]]:
        """By group, every rank's partition of the weights that the forward pass uses."""
        return self._optimizer.parallel_partitioned_bit16_groups

    def _gather(self) -> None:
        if self._world == 2:  # into their places: gloo's all-gather copies what it got once more
            works = [
                torch.distributed.broadcast(part, owner, async_op=True)
                for parts in self._weights
                for owner, part in enumerate(parts)
            ]
            for work in works:
                work.wait()  # type: ignore[union-attr]
            return
        for flat, parts in zip(self._optimizer.bit16_groups_flat, self._weights, strict=True):
            torch.distributed.all_gather_into_tensor(flat, parts[self._rank])


def _flat(p: Tensor) -> Tensor:
    """The gradient, of zeros where this micro-batch has none."""
    return p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1)
