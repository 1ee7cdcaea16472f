"""Trajectory consistency distillation (Zheng et al. 2024, arXiv 2402.19159), with the first-order semi-linear form.

The student jumps from t to any earlier s with one answer, alpha_s x_0 + sigma_s noise (DDIM's form, eq. 21 at order 1):
the network is not told s, as in the published students, so a jump over a curved path is right for one s alone and the
sampler (`tcd`) relies on its own noise, `eta`, to forgive it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.objectives.base import by_noise
from ldm.objectives.consistency import distance
from ldm.objectives.pairs import PairObjective
from ldm.objectives.teacher import check_range, guidance_of, place, solver_times
from ldm.rng import Rng
from ldm.types import Batch, Metrics


@dataclass(frozen=True, kw_only=True)
class TrajectoryOptions:
    """As of latent consistency distillation; the end of each jump is uniform between the first time and t_n."""

    kind: Literal["tcd"] = "tcd"
    w: tuple[float, float] = (2.0, 14.0)
    solver_steps: int = 50
    decay: float = 0.95
    loss: Literal["huber", "l2"] = "huber"
    huber: float = 0.001

    def __post_init__(self) -> None:
        check_range("w", self.w)
        if self.solver_steps < 1:
            raise ValueError(f"solver_steps must be at least 1, got {self.solver_steps}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")
        if not self.huber > 0:
            raise ValueError(f"huber must be above 0, got {self.huber}")


class TrajectoryObjective(PairObjective[TrajectoryOptions]):
    """Distance of the student's jump t_{n+k} -> s to the target's jump t_n -> s after a guided step of the teacher."""

    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Mean over the micro-batch; randomness belongs to each sample's global position."""
        options, schedule = self.options, self._student.process.schedule
        x0 = self._feed.latents(batch, rng, self.device)
        cond = self._feed.cond(batch, rng, self.device)
        late, near = (t.to(x0.device) for t in solver_times(schedule, options.solver_steps, rng.uniform("time")))
        end = near * rng.uniform("end").to(x0.device)
        if schedule.discrete:
            end = end.round().long()
        w = guidance_of(rng, options.w, x0.device)
        noise = rng.normal("noise", x0.shape[1:]).to(x0)
        x = self._student.process.add_noise(x0, noise, late)
        answer = place(schedule, *self._student.both(x, late, self._student.seen(cond, w)), end)
        with torch.no_grad():
            moved = place(schedule, *self._teacher.both(x, late, cond, w), near).to(x.dtype)
            goal = place(schedule, *self._goal.both(moved, near, self._goal.seen(cond, w)), end)
        losses = distance(answer, goal, options.loss, options.huber)
        loss = (losses * batch["weight"].to(losses)).mean()
        return loss, by_noise(losses.detach(), late / schedule.last)
