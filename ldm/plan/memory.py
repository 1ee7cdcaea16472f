"""What a rank holds: weights, gradients, optimizer, EMA, activations and buffers, by ZeRO stage.

Weights, masters, both moments of Adam and averages are float32 here, so a rank without division holds 16 bytes a weight
before averages (Rajbhandari et al. 2020, arXiv 1910.02054, section 3, has the same total for half-precision weights).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from ldm.models.network import NO_HIDDEN, hidden
from ldm.plan.links import ZeroPP
from ldm.plan.trace import Trace, trace

STAGES = (0, 1, 2, 3)
_WHOLE = 500_000_000
"""Elements that DeepSpeed's stage 0 reduces at once, in a copy of the gradients."""
_PERSISTENT = 10_000
"""Parameters up to this many elements stay whole under stage 3."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How training is divided. `copies`: averages; `moments`: of the optimizer, in float32 values a weight, and
    `hidden_moments` where those of hidden matrices are others; `bucket`: elements of a buffer; `live`: weights that
    stage 3 keeps whole between forward and backward.
    """

    stage: int
    world: int
    half: bool = False
    copies: int = 1
    moments: float = 2
    hidden_moments: float | None = None
    bucket: int = 50_000_000
    live: int = 1_000_000_000
    overlap: bool = True
    accumulate: int = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False
    zeropp: ZeroPP = field(default_factory=ZeroPP)

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage: {self.stage} is not one of {list(STAGES)}")
        if self.world < 1:
            raise ValueError(f"world must be at least 1, got {self.world}")

    def effective(self) -> Layout:
        """As the engine runs it: on one process stage 0, unless offloading or half-precision weights need another."""
        needed = self.offload_optimizer or self.offload_parameters or self.half
        return self if self.world > 1 or needed else replace(self, stage=0)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Bytes on one rank at the fullest moment of a step; `host` is in the host's memory and not in the total."""

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    ema: float = 0
    activations: float = 0
    buffers: float = 0
    frozen: float = 0
    host: float = 0

    @property
    def total(self) -> float:
        """All but `host`."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "host")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of trained weights, of those in parameters small enough to stay whole, of the largest module, and of
    those in matrices of hidden layers.
    """

    weights: int
    small: int
    largest: int
    hidden: int = 0

    @staticmethod
    def of(module: nn.Module) -> Sizes:
        """Of what requires a gradient."""
        trained = [p.numel() for p in module.parameters() if p.requires_grad]
        modules = [sum(p.numel() for p in m.parameters(recurse=False)) for m in module.modules()]
        matrices = {p for p in hidden(module) if p.requires_grad}
        return Sizes(
            weights=sum(trained), small=sum(n for n in trained if n <= _PERSISTENT), largest=max(modules),
            hidden=sum(p.numel() for p in matrices),
        )  # fmt: skip


@dataclass(frozen=True)
class Activations:
    """Peaks over the samples of a micro-batch, by two counts and the line through them; of one sample, its own count.

    A peak is the largest of several moments, each linear in the samples, so a line may lie too low below its counts.
    Of one count alone (`few` is `more`) all is proportional.
    """

    few: Trace
    more: Trace
    one: Trace | None = None

    @staticmethod
    def count(
        module: nn.Module,
        inputs: Callable[[int], tuple[Any, ...]],
        *,
        precision: torch.dtype,
        gpu: bool,
        batch: int = 2,
        one: bool = False,
    ) -> Activations:
        """Trace `module` on the meta device at `batch` and twice that, and with `one` of one sample."""
        batches = [batch, 2 * batch, *([1] if one else [])]
        return Activations(*(trace(module, inputs, b, precision=precision, gpu=gpu) for b in batches))

    def peak(self, batch: float) -> float:
        """Bytes of activations and temporaries at the fullest moment."""
        if self.one is not None and batch <= 1:
            return self.one.peak
        return self._line(batch, self.few.peak, self.more.peak)

    def kept(self, batch: float) -> float:
        """The same with all gradients of weights kept until the end of the backward pass."""
        if self.one is not None and batch <= 1:
            return self.one.peak_kept
        return max(self.peak(batch), self._line(batch, self.few.peak_kept, self.more.peak_kept))

    def _line(self, batch: float, low: float, high: float) -> float:
        if self.more.batch == self.few.batch:
            return low * batch / self.few.batch
        slope = (high - low) / (self.more.batch - self.few.batch)
        return max(0.0, low + slope * (batch - self.few.batch))


def memory(sizes: Sizes, activations: Activations, micro: float, layout: Layout, frozen: float = 0) -> Parts:
    """The fullest moment of a step with `micro` samples: the end of the forward pass, or the optimizer's step."""
    layout = layout.effective()
    states = _states(sizes, layout)
    kept, peak = activations.kept(micro), activations.peak(micro)
    whole, share = 4.0 * sizes.weights, 4.0 * sizes.weights / layout.world
    if layout.half and layout.stage:
        whole, share = whole / 2, share / 2
    bucket = 4.0 * min(layout.bucket, sizes.weights) * (2 if layout.overlap else 1)
    if layout.stage == 0:
        copied = min(whole, 4.0 * _WHOLE) if layout.world > 1 else 0.0  # one process has nothing to reduce
        moments = [(peak, whole if layout.accumulate > 1 else kept - peak, 0.0), (0.0, whole, copied)]
    elif layout.stage == 1:
        moments = [(peak, whole if layout.accumulate > 1 else kept - peak, bucket), (0.0, whole + share, 0.0)]
    elif layout.stage == 2:
        # What is accumulated, and the last micro-batch's share before it is added.
        held = 2 * share if layout.accumulate > 1 else (kept - peak) / layout.world
        moments = [(peak, held, bucket), (0.0, 2 * share, 0.0)]
    else:
        largest = min(sizes.weights, sizes.largest)  # is reduced in a copy of its gradient
        gathered = 4.0 * min(sizes.weights, sizes.small + max(layout.live, sizes.largest + layout.bucket))
        second = layout.zeropp.copy(
            sizes.weights, layout.world, element=2 if layout.half else 4, live=layout.live, accumulate=layout.accumulate
        )
        moments = [
            (peak, share, bucket + gathered + 4.0 * largest + second[0]),
            (0.0, 2 * share, 4.0 * sizes.small + second[1]),
        ]
    fullest = max(moments, key=sum)
    return Parts(
        weights=states.weights, optimizer=states.optimizer, ema=states.ema, host=states.host, frozen=frozen,
        activations=fullest[0], gradients=fullest[1], buffers=fullest[2],
    )  # fmt: skip


def _states(sizes: Sizes, layout: Layout) -> Parts:
    """What stays from step to step."""
    n = float(sizes.weights)
    divided = n / layout.world if layout.stage else n
    weight = 2.0 if layout.half and layout.stage else 4.0
    weights = weight * (n / layout.world if layout.stage == 3 else n)
    masters = 4.0 * divided if layout.stage else 0.0  # at stage 0 the weights are the masters
    optimizer = masters + 4.0 * layout.moments * divided
    if layout.hidden_moments is not None:
        if not sizes.hidden:
            raise ValueError(NO_HIDDEN)
        optimizer += 4.0 * (layout.hidden_moments - layout.moments) * sizes.hidden * divided / n
    host = 0.0
    if layout.offload_optimizer:
        host, optimizer = optimizer, 0.0
    if layout.offload_parameters:
        host, weights = host + weights, 0.0
    return Parts(weights=weights, optimizer=optimizer, ema=4.0 * layout.copies * divided, host=host)


def resting(sizes: Sizes, layout: Layout, frozen: float = 0) -> float:
    """Bytes that a rank holds between steps; stage 3 keeps room for its share of gradients and for a bucket."""
    layout = layout.effective()
    held = replace(_states(sizes, layout), frozen=frozen).total
    if layout.stage < 3:
        return held
    element = 2.0 if layout.half else 4.0
    return held + element * (sizes.weights / layout.world + min(layout.bucket, sizes.weights) + sizes.small)


def largest_micro_batch(
    sizes: Sizes, activations: Activations, layout: Layout, limit: float, frozen: float = 0, most: int = 4096
) -> int:
    """The most samples of a forward pass that fit into `limit` bytes; 0 when not even one does."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        if memory(sizes, activations, middle, layout, frozen).total <= limit:
            low = middle
        else:
            high = middle
    return low
