"""Distribution matching distillation (Yin et al. 2024, arXiv 2405.14867, DMD2 without its adversarial term).

The student's pictures are moved along the difference of two scores: the teacher's, and that of a critic that learns to
denoise the student's own pictures. Both trained networks are in one engine: the gradient enters at the pictures, which
the critic sees detached, so no weight is detached or swapped. What the one engine does not carry: two learning rates,
and a critic that steps alone; between the student's steps (`every`) its loss is 0, while Adam's momentum goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.diffusion.prediction import broadcast
from ldm.objectives.base import Objective
from ldm.objectives.consistency import boundary
from ldm.objectives.inputs import Feed
from ldm.objectives.teacher import Estimator, Teacher, check_range, guidance_of, place
from ldm.rng import Rng
from ldm.sampling.times import times
from ldm.types import Batch, Cond, Metrics


@dataclass(frozen=True, kw_only=True)
class MatchingOptions:
    """A student of `steps` steps at LCM's times; it learns in every `every`-th optimizer step, the critic in each.

    `span`: the part of the time range in which scores are compared; `critic`: weight of the critic's loss.
    """

    kind: Literal["dmd"] = "dmd"
    w: tuple[float, float] = (2.0, 2.0)
    steps: int = 4
    every: int = 5
    critic: float = 1.0
    span: tuple[float, float] = (0.02, 0.98)

    def __post_init__(self) -> None:
        check_range("w", self.w)
        for name in ("steps", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.critic > 0:
            raise ValueError(f"critic must be above 0, got {self.critic}")
        if not 0 <= self.span[0] < self.span[1] <= 1:
            raise ValueError(f"span must be [low, high] within [0, 1], got {list(self.span)}")


class MatchingObjective(Objective):
    """The student's and the critic's terms in one backward pass."""

    def __init__(
        self,
        trained: nn.Module,
        student: Estimator,
        critic: Estimator,
        teacher: Teacher,
        feed: Feed,
        options: MatchingOptions,
    ) -> None:
        """`trained` holds both networks. Raises ValueError when the schedule has no `steps` times."""
        super().__init__(trained)
        self.options = options
        self._student, self._critic, self._teacher, self._feed = student, critic, teacher, feed
        schedule = student.process.schedule
        self._times = times(schedule, options.steps, "lcm")
        self._dtype = torch.int64 if schedule.discrete else torch.float32
        self._step = 0

    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Mean over the micro-batch; all ranks make the same number of calls, as ZeRO 3 needs."""
        shape = self._feed.latents(batch, rng, self.device).shape[1:]
        cond = self._feed.cond(batch, rng, self.device)
        w = guidance_of(rng, self.options.w, self.device)
        x, t = self._starts(shape, self._student.seen(cond, w), rng)
        fake = self._generate(x, t, self._student.seen(cond, w))
        direction = self._direction(fake.detach(), cond, w, rng)
        matching = 0.5 * (fake - (fake - direction).detach()).square().flatten(1).mean(1)
        process = self._critic.process
        late, noise = self._noising(process.times(rng.uniform("critic time"))), rng.normal("critic noise", shape)
        noise = noise.to(fake)
        out = self._critic.out(process.add_noise(fake.detach(), noise, late), late, cond)
        critic = process.loss(out, fake.detach(), noise, late)
        on = float(self._step % self.options.every == 0)
        weight = batch["weight"].to(critic)
        loss = (weight * (on * matching + self.options.critic * critic)).mean()
        size = direction.square().flatten(1).mean(1).sqrt().mean()
        return loss, {"critic": critic.detach().mean(), "direction": size}

    def after_step(self, step: int) -> None:
        """Remember where the run is, for the student's turns."""
        self._step = step

    def _generate(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The student's picture, in the form that LCM's sampler evaluates."""
        skip, out = (broadcast(v, x) for v in boundary(t))
        x0, _ = self._student.both(x, t, cond)
        return skip.to(x0) * x + out.to(x0) * x0

    @torch.no_grad()
    def _starts(self, shape: torch.Size, cond: Cond, rng: Rng) -> tuple[Tensor, Tensor]:
        """Where one of the sampler's steps begins, its number uniform: what the student meets when it samples."""
        schedule, count = self._student.process.schedule, len(self._times)
        chosen = (rng.uniform("step") * count).long().clamp(max=count - 1).to(self.device)
        x = rng.normal("start", shape).to(self.device)
        start = x
        for k in range(count - 1):  # on every rank all of them
            now, after = self._full(self._times[k], x), self._full(self._times[k + 1], x)
            fresh = rng.normal(f"step {k}", shape).to(x)
            x = place(schedule, self._generate(x, now, cond), fresh, after).to(x.dtype)
            start = torch.where(broadcast(chosen, x) == k + 1, x, start)
        return start, torch.tensor(self._times, dtype=self._dtype, device=x.device)[chosen]

    @torch.no_grad()
    def _direction(self, fake: Tensor, cond: Cond, w: Tensor, rng: Rng) -> Tensor:
        """(critic's x_0 - teacher's x_0) over the teacher's mean distance: the gradient at the pictures (eq. 8)."""
        process = self._student.process
        t = self._noising(process.times(rng.uniform("score time")))
        x = process.add_noise(fake, rng.normal("score noise", fake.shape[1:]).to(fake), t)
        real, _ = self._teacher.both(x, t, cond, w)
        own, _ = self._critic.both(x, t, cond)
        scale = (fake - real).abs().flatten(1).mean(1).clamp(min=1e-6)
        return (own - real) / broadcast(scale, fake)

    def _noising(self, t: Tensor) -> Tensor:
        last = self._student.process.schedule.last
        low, high = (s * last for s in self.options.span)
        return (low + t.double() / last * (high - low)).to(self._dtype).to(self.device)

    def _full(self, t: float, x: Tensor) -> Tensor:
        return torch.full((len(x),), t, dtype=self._dtype, device=x.device)
