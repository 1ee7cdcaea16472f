"""Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378, algorithm 1), full or through an adapter.

Legend: w guidance strength (scale - 1), f the consistency function c_skip x + c_out x_0(x, t), t_n and t_{n+k}
neighbouring times of the skipping DDIM solver.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.prediction import broadcast
from ldm.objectives.base import by_noise
from ldm.objectives.pairs import PairObjective, PairOptions
from ldm.objectives.teacher import Estimator, place, solver_stride
from ldm.rng import Rng
from ldm.types import Batch, Cond, Metrics


@dataclass(frozen=True, kw_only=True)
class ConsistencyOptions(PairOptions):
    """`reach` is how many of the solver's steps lie between both ends of a pair: 1 in the paper.

    With more, answers travel from the data to the noise in fewer hops, at two teacher calls a step; from `solver_steps`
    on, the goal is the end of the teacher's path itself and no target network is asked. `scaling` and `data_std` shape
    the boundary condition and must be those of the sampler (10, 0.5).
    """

    kind: Literal["lcm"] = "lcm"
    reach: int = 1
    scaling: float = 10.0
    data_std: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reach < 1:
            raise ValueError(f"reach must be at least 1, got {self.reach}")
        for name in ("scaling", "data_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


class ConsistencyObjective(PairObjective[ConsistencyOptions]):
    """Distance of f at t_{n+k} to the target network's f where one guided DDIM step of the teacher arrives, t_n."""

    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Mean over the micro-batch; randomness belongs to each sample's global position."""
        options, begun = self.options, self.begin(batch, rng)
        x, cond, w = begun.x, begun.cond, begun.w
        late = begun.late.to(x.device)
        answer = self.consistent(self._student, x, late, self._student.seen(cond, w))
        with torch.no_grad():
            clean, goal, near = self._moved(x, begun.late, begun.near, cond, w)
            if options.reach < options.solver_steps:  # not per batch: all ranks must ask, or none
                goal = self.consistent(self._goal, goal, near.to(x.device), self._goal.seen(cond, w))
        losses = distance(answer, goal, options.loss, options.huber)
        level = late / self._student.process.schedule.last
        gap = (answer.detach() - clean).square().flatten(1).mean(1)
        metrics = by_noise(losses.detach(), level) | by_noise(gap, level, "gap")
        return (losses * batch["weight"].to(losses)).mean(), metrics

    def _moved(self, x: Tensor, late: Tensor, near: Tensor, cond: Cond, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(the teacher's x_0 at `late`, where its `reach` DDIM steps arrive, when); times (B,) on the CPU.

        What has come to t = 0 takes no further step.
        """
        schedule = self._student.process.schedule
        stride = solver_stride(schedule, self.options.solver_steps)
        clean, implied = self._teacher.both(x, late.to(x.device), cond, w)
        moved = place(schedule, clean, implied, near.to(x.device)).to(x.dtype)
        for _ in range(self.options.reach - 1):
            rows = near.nonzero().flatten()
            if not len(rows):
                break
            now, here = near[rows], rows.to(x.device)
            near = near.index_put((rows,), (now - stride).clamp(min=0))
            part = {name: value[here] for name, value in cond.items()}
            known, noise = self._teacher.both(moved[here], now.to(x.device), part, w[here])
            step = place(schedule, known, noise, near[rows].to(x.device)).to(x.dtype)
            moved = moved.index_put((here,), step)
        return clean, moved, near

    def consistent(self, estimator: Estimator, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """f(x, t), float32; x itself at t = 0."""
        skip, out = boundary(t, self.options.scaling, self.options.data_std)
        x0, _ = estimator.both(x, t, cond)
        return broadcast(skip, x).to(x0) * x.to(x0) + broadcast(out, x).to(x0) * x0


def boundary(t: Tensor, scaling: float = 10.0, data_std: float = 0.5) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of times (B,): 1 and 0 at t = 0 (arXiv 2310.04378, section 4.1)."""
    scaled = t.double() * scaling
    total = scaled.square() + data_std**2
    return (data_std**2 / total).float(), (scaled / total.sqrt()).float()


def distance(a: Tensor, b: Tensor, kind: Literal["huber", "l2"], width: float) -> Tensor:
    """Per sample (B,): the mean squared error, or the pseudo-Huber sqrt(d^2 + width^2) - width."""
    square = (a - b).square()
    each = square if kind == "l2" else (square + width**2).sqrt() - width
    return each.flatten(1).mean(1)
