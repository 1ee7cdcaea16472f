"""Distribution matching distillation (Yin et al. 2024, arXiv 2405.14867: DMD2).

The student's pictures are moved along the difference of two scores: the teacher's, and that of a critic that learns to
denoise the student's own pictures; and, if so configured, away from what a head on the critic's middle features, or a
small network of its own, tells from real ones (section 4.3). All trained networks are in one engine: the gradient
enters at the pictures, which the critic sees detached or, for the head, through `turned`, so no weight is detached or
swapped and one backward pass does. What the one engine does not carry: two learning rates (a LoRA's alpha scales its
own), and a critic that steps alone; between the student's steps (`every`) its gradient is 0, while Adam's momentum
goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm.diffusion.prediction import broadcast
from ldm.diffusion.schedule import Schedule
from ldm.objectives.base import Objective
from ldm.objectives.consistency import boundary
from ldm.objectives.inputs import Feed
from ldm.objectives.teacher import Estimator, Teacher, check_range, guidance_of, place
from ldm.rng import Rng
from ldm.sampling.times import subset, times
from ldm.types import Batch, Cond, Metrics


@dataclass(frozen=True, kw_only=True)
class MatchingOptions:
    """A student of any number of `steps`, at LCM's times of a path of `solver_steps`.

    Each picture's number is one of `steps`, drawn uniformly (named twice, it counts twice). The student learns in every
    `every`-th optimizer step after the first `alone`, the critic in each. `span`: the part of the time range in which
    scores are compared; `critic`: weight of the critic's loss; `adversarial`: weight of the student's adversarial term
    (0: none, and no head); `head`: that of the head's own loss; `judge`: what the head sees, the critic's middle or
    patches of the noised latents; `judged`: the part of the time range in which it does.
    """

    kind: Literal["dmd"] = "dmd"
    w: tuple[float, float] = (2.0, 2.0)
    """Range of the teacher's guidance strength, drawn uniformly for each sample."""
    steps: tuple[int, ...] = (4,)
    solver_steps: int = 50
    every: int = 5
    alone: int = 0
    critic: float = 1.0
    span: tuple[float, float] = (0.02, 0.98)
    adversarial: float = 0.0
    head: float = 0.01
    judge: Literal["middle", "patches"] = "middle"
    judged: tuple[float, float] = (0.02, 0.98)

    def __post_init__(self) -> None:
        check_range("w", self.w)
        for name in ("solver_steps", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.steps or not all(1 <= n <= self.solver_steps for n in self.steps):
            raise ValueError(f"steps must lie in [1, {self.solver_steps}] (solver_steps), got {list(self.steps)}")
        if self.alone < 0:
            raise ValueError(f"alone must be at least 0 steps, got {self.alone}")
        if not self.critic > 0:
            raise ValueError(f"critic must be above 0, got {self.critic}")
        if self.adversarial < 0:
            raise ValueError(f"adversarial must be at least 0 (0 is off), got {self.adversarial}")
        if not self.head > 0:
            raise ValueError(f"head must be above 0, got {self.head}")
        for name in ("span", "judged"):
            low, high = getattr(self, name)
            if not 0 <= low < high <= 1:
                raise ValueError(f"{name} must be [low, high] within [0, 1], got {[low, high]}")


Logits = Callable[[Tensor, Tensor, Cond], Tensor]
"""(noised pictures, t (B,), conditioning) -> logits (B,) of being real."""


class MatchingObjective(Objective):
    """The student's, the critic's and the head's terms in one backward pass."""

    def __init__(
        self,
        trained: nn.Module,
        student: Estimator,
        critic: Estimator,
        teacher: Teacher,
        feed: Feed,
        options: MatchingOptions,
        logits: Logits | None = None,
    ) -> None:
        """`trained` holds both networks, and the head of `logits`, which the adversarial term needs.

        Raises ValueError when the schedule has no `steps` times.
        """
        super().__init__(trained)
        if (logits is None) != (options.adversarial == 0):
            raise ValueError(f"adversarial: weight {options.adversarial} and a head belong together")
        self._logits = logits
        self.options = options
        self._student, self._critic, self._teacher, self._feed = student, critic, teacher, feed
        schedule = student.process.schedule
        self._paths = [_path(schedule, n, options.solver_steps) for n in options.steps]
        self._dtype = torch.int64 if schedule.discrete else torch.float32
        self._step = 0
        self._told: Metrics = {}

    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Mean over the micro-batch; all ranks make the same number of calls, as ZeRO 3 needs."""
        real = self._feed.latents(batch, rng, self.device)
        shape = real.shape[1:]
        cond = self._feed.cond(batch, rng, self.device)
        w = guidance_of(rng, self.options.w, self.device)
        turn, told = self.turn, self._student.seen(cond, w)
        x, t = self._starts(shape, told, rng)
        with torch.set_grad_enabled(turn):
            fake = self._generate(x, t, told)
        process = self._critic.process
        late = self._noising(process.times(rng.uniform("critic time")), self.options.span)
        noise = rng.normal("critic noise", shape).to(fake)
        out = self._critic.out(process.add_noise(fake.detach(), noise, late), late, self._critic.seen(cond, 0 * w))
        critic = process.loss(out, fake.detach(), noise, late)
        total, metrics = self.options.critic * critic, {"critic": critic.detach().mean()}
        if turn:
            direction = self._direction(fake.detach(), cond, w, rng)
            total = total + 0.5 * (fake - (fake - direction).detach()).square().flatten(1).mean(1)
            self._told = {"direction": direction.square().flatten(1).mean(1).sqrt().mean()}
        else:  # every stage of ZeRO wants a gradient of every weight: zeros, by way of one picture
            total = total + 0.0 * self._generate(x[:1], t[:1], {k: v[:1] for k, v in told.items()}).mean()
        metrics |= self._told  # of the last turn: the log's steps may all lie between turns
        if self._logits is not None:
            judged, metrics["head_right"] = self._judged(real, fake, self._critic.seen(cond, 0 * w), rng)
            total = total + self.options.head * judged
        return (batch["weight"].to(total) * total).mean(), metrics

    @property
    def turn(self) -> bool:
        """Whether the student learns in this step; on all ranks alike."""
        done = self._step - self.options.alone
        return done >= 0 and done % self.options.every == 0

    def _judged(self, real: Tensor, fake: Tensor, cond: Cond, rng: Rng) -> tuple[Tensor, Tensor]:
        """(the head's loss (B,), its share of right answers); the student's gradient comes by `turned`.

        The head learns softplus(-l) of real and softplus(l) of generated latents l at one noise level; the student
        softplus(-l) of its own (section 4.3, the loss of arXiv 1406.2661 that does not saturate).
        """
        process, shape = self._student.process, fake.shape[1:]
        t = self._noising(process.times(rng.uniform("head time")), self.options.judged)
        given, turn = turned(fake)
        pair = [(real, "head noise, real"), (given, "head noise, generated")]
        assert self._logits is not None
        noised = [process.add_noise(x.to(fake), rng.normal(name, shape).to(fake), t) for x, name in pair]
        both = {k: torch.cat([v, v]) for k, v in cond.items()}
        logits = self._logits(torch.cat(noised), torch.cat([t, t]), both).float()
        own, made = logits.chunk(2)
        turn(-self.options.adversarial / self.options.head * (-made.detach()).clamp(max=20).exp())
        right = torch.cat([own > 0, made < 0]).float().mean()
        return functional.softplus(-own) + functional.softplus(made), right

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
        """Where one of the sampler's steps begins: a path, then its step, both uniform."""
        schedule, longest = self._student.process.schedule, max(map(len, self._paths))
        lengths = torch.tensor([len(path) for path in self._paths])
        padded = [[*path, *path[-1:] * (longest - len(path))] for path in self._paths]
        path = (rng.uniform("path") * len(self._paths)).long().clamp(max=len(self._paths) - 1)
        step = (rng.uniform("step") * lengths[path]).long().minimum(lengths[path] - 1)
        visited = torch.tensor(padded, dtype=self._dtype)[path].to(self.device)
        x = rng.normal("start", shape).to(self.device)
        for k in range(longest - 1):
            rows = (step > k).nonzero().flatten()  # found on the CPU, which needs no waiting
            asked = (rows if len(rows) else torch.zeros(1, dtype=torch.int64)).to(x.device)  # all ranks ask
            now, after = visited[asked, k], visited[asked, k + 1]
            x0 = self._generate(x[asked], now, {name: value[asked] for name, value in cond.items()})
            moved = place(schedule, x0, rng.normal(f"step {k}", shape).to(x)[asked], after).to(x.dtype)
            x = x.index_put((asked[: len(rows)],), moved[: len(rows)])
        return x, visited.gather(1, step[:, None].to(x.device))[:, 0]

    @torch.no_grad()
    def _direction(self, fake: Tensor, cond: Cond, w: Tensor, rng: Rng) -> Tensor:
        """(critic's x_0 - teacher's x_0) over the teacher's mean distance: the gradient at the pictures (eq. 8)."""
        process = self._student.process
        t = self._noising(process.times(rng.uniform("score time")), self.options.span)
        x = process.add_noise(fake, rng.normal("score noise", fake.shape[1:]).to(fake), t)
        real, _ = self._teacher.both(x, t, cond, w)
        own, _ = self._critic.both(x, t, self._critic.seen(cond, 0 * w))
        scale = (fake - real).abs().flatten(1).mean(1).clamp(min=1e-6)
        return (own - real) / broadcast(scale, fake)

    def _noising(self, t: Tensor, span: tuple[float, float]) -> Tensor:
        last = self._student.process.schedule.last
        low, high = (s * last for s in span)
        return (low + t.double() / last * (high - low)).to(self._dtype).to(self.device)


def _path(schedule: Schedule, steps: int, solver_steps: int) -> list[float]:
    """The times of LCM's sampler in `steps` steps; a flow's are real, and those of the sampler itself."""
    return subset(schedule, steps, solver_steps) if schedule.discrete else times(schedule, steps, "lcm")


def turned(x: Tensor) -> tuple[Tensor, Callable[[Tensor], None]]:
    """(x, a function to give factors (B,) to): the gradient that comes back through this x is multiplied by them.

    d softplus(-l) = -exp(-l) d softplus(l): one backward pass through a classifier serves its own loss on what was
    generated, and, turned where it enters the pictures, the loss of who generated them.
    """
    factors: list[Tensor] = []
    given = x.view_as(x)
    if given.requires_grad:
        given.register_hook(lambda gradient: gradient * broadcast(factors[0], gradient).to(gradient))
    return given, factors.append
