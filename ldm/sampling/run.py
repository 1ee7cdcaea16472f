"""What a solver is given: the nodes it visits, the estimate of x_0 at a node, and the noise of each step.

Legend: a node is (t, alpha, sigma) in float64; lam = log(alpha / sigma); ratio = sigma / alpha (EDM's sigma).
The state stays variance-preserving, x = alpha x_0 + sigma noise, so that zero terminal SNR and flows fit in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.types import Cond, Denoise, Net

Clip = Callable[[Tensor], Tensor]
Noise = Callable[[int], Tensor]
Progress = Callable[[int, Tensor], None]
"""(solver step, x after it)."""

Count = Callable[[int, int], object]
"""(solver steps done, solver steps in all)."""


class Node(NamedTuple):
    """One time with its noise level."""

    t: float
    alpha: float
    sigma: float

    @property
    def lam(self) -> float:
        if self.alpha <= 0:
            return -math.inf
        return math.log(self.alpha / self.sigma) if self.sigma > 0 else math.inf

    @property
    def ratio(self) -> float:
        return self.sigma / self.alpha if self.alpha > 0 else math.inf


def nodes(schedule: Schedule, times: Sequence[float], end: Literal["data", "first"] = "data") -> list[Node]:
    """A node per time, then the end: "data" (alpha 1, sigma 0) or the schedule's own first noise level.

    With "first" and times that already reach it, the last step has no length, as in the DDIM authors' code.
    """
    path = [Node(t, *schedule.at(t)) for t in times]
    tail = schedule.at(schedule.first) if end == "first" else (1.0, 0.0)
    return [*path, Node(schedule.first, *tail)]


@dataclass
class Run:
    """The state of one sampling run that solvers share."""

    denoise: Denoise
    cond: Cond
    schedule: Schedule
    nodes: list[Node]
    source: Noise
    clip: Clip | None = None
    progress: Progress | None = None
    step: int = 0
    flags: list[tuple[int, Tensor]] = field(default_factory=list)

    @property
    def pairs(self) -> list[tuple[int, Node, Node]]:
        """(step index, from, to) of each step."""
        return [(i, a, b) for i, (a, b) in enumerate(zip(self.nodes, self.nodes[1:]))]

    def order(self, index: int, order: int, settle: int | None = 15) -> int:
        """The order of a multistep formula at step `index`: what its past allows, 1 into the data or over no length.

        Runs of fewer than `settle` steps (None: all) that end in the data also lower the order towards their end.
        """
        a, b = self.nodes[index], self.nodes[index + 1]
        if not a.sigma > b.sigma > 0:
            return 1
        known = index if self.nodes[0].alpha == 0 else index + 1  # a past with infinite lam is no past
        count = len(self.nodes) - 1
        if self.nodes[-1].sigma == 0 and (settle is None or count < settle):
            order = min(order, count - index)
        return max(1, min(order, known))

    def raw(self, x: Tensor, node: Node) -> Tensor:
        """The estimate of x_0 before any clipping. Raises ValueError naming the step if it is not finite."""
        out = self.denoise(x, self.times(x, node), self.cond)
        self.watch(out)
        return out

    def times(self, x: Tensor, node: Node) -> Tensor:
        return torch.full((x.shape[0],), node.t, dtype=torch.float32, device=x.device)

    def x0(self, x: Tensor, node: Node) -> Tensor:
        """The (clipped) estimate of x_0."""
        return self.clipped(self.raw(x, node))

    def noise_at(self, x: Tensor, node: Node) -> Tensor:
        """The estimate of the noise, from the clipped x_0."""
        return implied_noise(x, self.x0(x, node), node)

    def both(self, x: Tensor, node: Node) -> tuple[Tensor, Tensor]:
        """(clipped x_0, noise of the network itself, before clipping)."""
        raw = self.raw(x, node)
        return self.clipped(raw), implied_noise(x, raw, node)

    def clipped(self, x0: Tensor) -> Tensor:
        return x0 if self.clip is None else self.clip(x0)

    def noise(self, index: int, like: Tensor) -> Tensor:
        """Standard normal of solver step `index`, shaped as the state."""
        return self.source(index).to(device=like.device, dtype=like.dtype)

    def done(self, index: int, x: Tensor) -> None:
        """Mark step `index` as finished."""
        self.step = index + 1
        if self.progress is not None:
            self.progress(index, x)

    def at_lam(self, lam: float) -> Node:
        """The node with half-log-SNR lam."""
        alpha, sigma = math.sqrt(_sigmoid(2 * lam)), math.sqrt(_sigmoid(-2 * lam))
        time = self.schedule.time(lam)
        if not self.schedule.discrete:
            alpha, sigma = self.schedule.at(time)
        return Node(time, alpha, sigma)

    def check(self) -> None:
        """Raise ValueError if any network output was not finite; the one point that waits for the device."""
        if not self.flags:
            return
        bad = torch.stack([flag for _, flag in self.flags]).tolist()
        for (step, _), flag in zip(self.flags, bad):
            if flag:
                raise _not_finite(step, self.nodes[min(step, len(self.nodes) - 1)].t)

    def watch(self, out: Tensor) -> None:
        """Remember whether a network output is finite, for `check`: reading it here would wait for the device."""
        self.flags.append((self.step, ~torch.isfinite(out).all()))


def _not_finite(step: int, t: float) -> ValueError:
    return ValueError(f"the network's output is not finite at sampling step {step} (time {t:g})")


def _sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v)) if v > -700 else 0.0


def implied_noise(x: Tensor, x0: Tensor, node: Node) -> Tensor:
    """The noise that x and x_0 imply; 0 at a node without noise."""
    return (x - node.alpha * x0) / node.sigma if node.sigma > 0 else torch.zeros_like(x)


def dynamic_threshold(quantile: float = 0.995, ceiling: float = math.inf) -> Clip:
    """Clamp each sample to its own `quantile` of |x_0|, at least 1 and at most `ceiling`, and divide (Imagen, 2.3).

    For pixels in [-1, 1]; latents have no such range.
    """
    if not 0 < quantile <= 1 or not ceiling >= 1:
        raise ValueError(f"quantile must lie in (0, 1] and ceiling be at least 1, got {quantile} and {ceiling}")

    def clip(x0: Tensor) -> Tensor:
        bound = torch.quantile(x0.flatten(1).abs().float(), quantile, dim=1).clamp(1, ceiling).to(x0.dtype)
        bound = bound.view(-1, *[1] * (x0.dim() - 1))
        return torch.minimum(torch.maximum(x0, -bound), bound) / bound

    return clip


def clamp(bound: float) -> Clip:
    """Clamp x_0 to [-bound, bound]."""
    if not bound > 0:
        raise ValueError(f"clip must be above 0, got {bound}")
    return lambda x0: x0.clamp(-bound, bound)


def counted(progress: Count, before: int, total: int) -> Progress:
    """A solver's callback that counts the steps of all batches."""

    def step(i: int, _: Tensor) -> None:
        progress(before + i + 1, total)

    return step


def whole(net: Net) -> Net:
    """The network told times without their fraction, as diffusers' solvers on flow sigmas tell it."""
    return lambda x, t, cond: net(x, t.floor(), cond)
