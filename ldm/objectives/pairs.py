"""What consistency and trajectory distillation share: two ends of a step of the teacher, and a target that follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor, nn

from ldm.objectives.base import Objective
from ldm.objectives.inputs import Feed
from ldm.objectives.teacher import Estimator, Target, Teacher, check_range, guidance_of, solver_times
from ldm.rng import Rng
from ldm.types import Batch, Cond


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """`w`: range of the teacher's guidance strength, drawn uniformly for each sample; [0, 0] is no guidance.

    `solver_steps` is the number of DDIM steps that the teacher's whole path has; samplers visit a subset of them.
    `decay` 0 makes the student itself the target. `huber` is the Huber loss' width.
    """

    w: tuple[float, float] = (2.0, 14.0)
    solver_steps: int = 50
    decay: float = 0.95
    loss: Literal["huber", "l2"] = "huber"
    """Of both ends' answers: the Huber loss of width `huber`, or the squared error."""
    huber: float = 0.001

    def __post_init__(self) -> None:
        check_range("w", self.w)
        if self.solver_steps < 1:
            raise ValueError(f"solver_steps must be at least 1, got {self.solver_steps}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")
        if not self.huber > 0:
            raise ValueError(f"huber must be above 0, got {self.huber}")


@dataclass(frozen=True)
class Step:
    """A batch's step of the teacher: the noised latents x at `late`, and what it goes to at `near`.

    Times (B,) stay on the CPU, w (B,) is the guidance strength.
    """

    x: Tensor
    cond: Cond
    late: Tensor
    near: Tensor
    w: Tensor


Options = TypeVar("Options", bound=PairOptions)


class PairObjective(Objective, Generic[Options]):
    """A student whose answer at one time is held against its target network's where the teacher's path goes on."""

    def __init__(
        self,
        trained: nn.Module,
        student: Estimator,
        goal: Estimator,
        teacher: Teacher,
        feed: Feed,
        options: Options,
        target: Target | None,
    ) -> None:
        """`goal` is the target network; with `target` None it is the student itself, without gradients."""
        super().__init__(trained)
        self.options, self._target = options, target
        self._student, self._goal, self._teacher, self._feed = student, goal, teacher, feed

    def begin(self, batch: Batch, rng: Rng) -> Step:
        """Noised latents at a time of the solver; randomness belongs to each sample's global position."""
        x0 = self._feed.latents(batch, rng, self.device)
        cond = self._feed.cond(batch, rng, self.device)
        process, options = self._student.process, self.options
        late, near = solver_times(process.schedule, options.solver_steps, rng.uniform("time"))
        noise = rng.normal("noise", x0.shape[1:]).to(x0)
        x = process.add_noise(x0, noise, late.to(x0.device))
        return Step(x, cond, late, near, guidance_of(rng, options.w, x0.device))

    def after_step(self, step: int) -> None:
        if self._target is not None:
            self._target.follow(step, self.whole())

    def state(self) -> dict[str, Any]:
        return {} if self._target is None else {"tensors": self._target.tensors()}

    def load_state(self, state: dict[str, Any]) -> None:
        if self._target is not None:
            self._target.load(state.get("tensors", {}))
