"""Losses that stand around a denoising loss, and are what it is in all but their value; abstract."""

from __future__ import annotations

from typing import Any

from ldm.objectives.base import Objective, Whole
from ldm.objectives.denoise import DenoiseObjective


class AroundDenoise(Objective):
    """Hands to a denoising loss what a trainer tells, and keeps its state as its own."""

    def __init__(self, denoise: DenoiseObjective) -> None:
        super().__init__(denoise.trained)
        self._denoise = (denoise,)  # in a tuple: `trained` is registered once

    @property
    def denoise(self) -> DenoiseObjective:
        """The denoising loss."""
        return self._denoise[0]

    def after_step(self, step: int) -> None:
        self.denoise.after_step(step)

    def bind(self, whole: Whole) -> None:
        super().bind(whole)
        self.denoise.bind(whole)

    def state(self) -> dict[str, Any]:
        return self.denoise.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.denoise.load_state(state)
