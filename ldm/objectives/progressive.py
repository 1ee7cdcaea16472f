"""Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512, algorithm 2), guidance folded in (2210.03142).

On a rectified flow a DDIM step is Euler's: with x = (1 - s) x_0 + s noise and velocity noise - x_0 the student's target
is the mean of the teacher's two velocities, each weighed by the length of its step in sigma.

Legend: N student steps, u = (i + 1) / N the place of time t on the path, u_mid = u - 1 / 2N, u_s = u - 1 / N, f =
sigma_s / sigma_t, w guidance strength (scale - 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.diffusion.prediction import broadcast
from ldm.diffusion.schedule import Flow, Schedule
from ldm.objectives.base import Objective, by_noise
from ldm.objectives.inputs import Feed
from ldm.objectives.teacher import Estimator, Teacher, check_range, guidance_of
from ldm.rng import Rng
from ldm.sampling.flow_times import flow_times
from ldm.sampling.times import times
from ldm.types import Batch, Metrics


@dataclass(frozen=True, kw_only=True)
class ProgressiveOptions:
    """One round: a student of `steps` DDIM steps (trailing times) from a teacher of twice as many.

    `ldm distill progressive` goes on, halving, down to `until` steps. `stage` "match" learns the guided teacher's
    answer at every time instead, without halving: it folds guidance in, and turns an epsilon teacher into a v student.
    """

    kind: Literal["progressive"] = "progressive"
    steps: int = 32
    until: int = 1
    stage: Literal["halve", "match"] = "halve"
    w: tuple[float, float] = (0.0, 4.0)
    """Range of the teacher's guidance strength, drawn uniformly for each sample."""

    def __post_init__(self) -> None:
        check_range("w", self.w)
        if self.until < 1:
            raise ValueError(f"until must be at least 1, got {self.until}")
        if self.steps < self.until:
            raise ValueError(f"steps must be at least `until`, {self.until}, got {self.steps}")

    def rounds(self) -> tuple[int, ...]:
        """Student steps of the rounds. Raises ValueError when halving does not end at `until`."""
        counts = [self.steps]
        while counts[-1] > self.until:
            if counts[-1] % 2:
                raise ValueError(f"steps {self.steps} does not halve to until {self.until}")
            counts.append(counts[-1] // 2)
        if counts[-1] != self.until:
            raise ValueError(f"steps {self.steps} does not halve to until {self.until}")
        return tuple(counts)


class Path:
    """The 2N + 1 times of a teacher's DDIM path, from the data (alpha 1, sigma 0) to the noise."""

    def __init__(self, schedule: Schedule, steps: int, grid: str | None = None) -> None:
        """`grid`: one of a flow's (`ldm.sampling.flow_times`) whose N times are every second of its 2N.

        None is the trailing times. Raises ValueError when the schedule has no 2N times, and for a flow whose times are
        stretched to a terminal sigma: those of N steps are none of those of 2N.
        """
        if isinstance(schedule, Flow) and schedule.terminal is not None:
            raise ValueError(
                f"progressive distillation: with shift_terminal {schedule.terminal:g} the flow's times of N steps are "
                "none of those of 2N"
            )
        visited = times(schedule, 2 * steps, "trailing")
        if grid is not None and isinstance(schedule, Flow):
            visited = flow_times(schedule, 2 * steps, grid)
        late = visited[::-1]
        levels = [(1.0, 0.0), *map(schedule.at, late)]
        self.steps = steps
        self._t = torch.tensor([0.0, *late], dtype=torch.int64 if schedule.discrete else torch.float64)
        self._levels = torch.tensor(levels, dtype=torch.float64)

    def at(
        self, index: Tensor, dtype: torch.dtype, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(t, alpha, sigma) of points `index` (B,), 0 the data, on a device (None: that of `index`).

        Real times have at least float32.
        """
        device = device or index.device
        t, levels = self._t[index.cpu()], self._levels[index.cpu()].to(device, dtype)
        t = t.to(torch.promote_types(dtype, torch.float32)) if t.is_floating_point() else t
        return t.to(device), levels[:, 0], levels[:, 1]


class ProgressiveObjective(Objective):
    """Error of the student's x_0, weighed by max(SNR, 1), to the x_0 whose one DDIM step is the teacher's two."""

    def __init__(
        self,
        trained: nn.Module,
        student: Estimator,
        teacher: Teacher,
        feed: Feed,
        options: ProgressiveOptions,
        grid: str | None = None,
    ) -> None:
        """`grid` as `Path` takes it: the times that the student's sampler visits."""
        super().__init__(trained)
        self.options = options
        self._student, self._teacher, self._feed = student, teacher, feed
        self._path = Path(student.process.schedule, options.steps, grid) if options.stage == "halve" else None

    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Mean over the micro-batch; randomness belongs to each sample's global position."""
        process = self._student.process
        x0 = self._feed.latents(batch, rng, self.device)
        cond = self._feed.cond(batch, rng, self.device)
        w = guidance_of(rng, self.options.w, x0.device)
        u, noise = rng.uniform("time"), rng.normal("noise", x0.shape[1:]).to(x0)
        if self._path is None:
            t = process.times(u).to(x0.device)
            x = process.add_noise(x0, noise, t)
            goal, _ = self._teacher.both(x, t, cond, w)
        else:
            i = (u.double() * self._path.steps).long().clamp(max=self._path.steps - 1)  # on the host, as the path is
            t, *_ = self._path.at(2 * i + 2, x0.dtype, x0.device)
            x = process.add_noise(x0, noise, t)
            goal = two_steps(self._teacher, self._path, x, i, cond, w)
        answer, _ = self._student.both(x, t, self._student.seen(cond, w))
        losses = (answer - goal).square().flatten(1).mean(1) * snr_weight(*process.schedule.alpha_sigma(t))
        loss = (losses * batch["weight"].to(losses)).mean()
        return loss, by_noise(losses.detach(), t / process.schedule.last)


@torch.no_grad()
def two_steps(teacher: Teacher, path: Path, x: Tensor, i: Tensor, cond: dict[str, Tensor], w: Tensor) -> Tensor:
    """The x_0 that takes x at step i to where two DDIM steps of the teacher arrive (algorithm 2, appendix G).

    (z'' - f x) / (alpha_s - f alpha_t); at i = 0 the path ends in the data and this is the teacher's own second x_0.
    """
    t, alpha, sigma = path.at(2 * i + 2, x.dtype, x.device)
    mid, alpha_mid, sigma_mid = path.at(2 * i + 1, x.dtype, x.device)
    _, alpha_s, sigma_s = path.at(2 * i, x.dtype, x.device)
    alpha, sigma, alpha_mid, sigma_mid, alpha_s, sigma_s = (
        broadcast(v, x) for v in (alpha, sigma, alpha_mid, sigma_mid, alpha_s, sigma_s)
    )
    clean, implied = teacher.both(x, t, cond, w)
    middle = alpha_mid * clean + sigma_mid * implied
    clean, implied = teacher.both(middle, mid, cond, w)
    end = alpha_s * clean + sigma_s * implied
    f = sigma_s / sigma
    return (end - f * x) / (alpha_s - f * alpha)


def snr_weight(alpha: Tensor, sigma: Tensor) -> Tensor:
    """max(SNR, 1), the truncated weight of x_0's error (section 4)."""
    return (alpha**2 / sigma**2).clamp(min=1)
