"""What consistency and trajectory distillation share: two ends of a step of the teacher, and a target that follows."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from torch import nn

from ldm.objectives.base import Objective
from ldm.objectives.inputs import Feed
from ldm.objectives.teacher import Estimator, Target, Teacher

Options = TypeVar("Options")


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

    def after_step(self, step: int) -> None:
        if self._target is not None:
            self._target.follow(step, self.whole())

    def state(self) -> dict[str, Any]:
        return {} if self._target is None else {"tensors": self._target.tensors()}

    def load_state(self, state: dict[str, Any]) -> None:
        if self._target is not None:
            self._target.load(state.get("tensors", {}))
