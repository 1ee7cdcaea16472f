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
from ldm.objectives.pairs import PairObjective, PairOptions
from ldm.objectives.teacher import place
from ldm.rng import Rng
from ldm.types import Batch, Metrics


@dataclass(frozen=True, kw_only=True)
class TrajectoryOptions(PairOptions):
    """As of latent consistency distillation; the end of each jump is uniform between the first time and t_n."""

    kind: Literal["tcd"] = "tcd"


class TrajectoryObjective(PairObjective[TrajectoryOptions]):
    """Distance of the student's jump t_{n+k} -> s to the target's jump t_n -> s after a guided step of the teacher."""

    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Mean over the micro-batch; randomness belongs to each sample's global position."""
        options, schedule, begun = self.options, self._student.process.schedule, self.begin(batch, rng)
        x, cond, w = begun.x, begun.cond, begun.w
        late, near = begun.late.to(x.device), begun.near.to(x.device)
        end = near * rng.uniform("end").to(x.device)
        if schedule.discrete:
            end = end.round().long()
        answer = place(schedule, *self._student.both(x, late, self._student.seen(cond, w)), end)
        with torch.no_grad():
            moved = place(schedule, *self._teacher.both(x, late, cond, w), near).to(x.dtype)
            goal = place(schedule, *self._goal.both(moved, near, self._goal.seen(cond, w)), end)
        losses = distance(answer, goal, options.loss, options.huber)
        loss = (losses * batch["weight"].to(losses)).mean()
        return loss, by_noise(losses.detach(), late / schedule.last)
