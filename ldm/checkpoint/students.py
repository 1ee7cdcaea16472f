"""How a few-step student is drawn with, as its scheduler's config says: the sampler, and the times it knows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.diffusion.schedule import Schedule
from ldm.sampling.times import subset

SAMPLERS = {"LCMScheduler": "lcm", "FlowMatchLCMScheduler": "lcm", "TCDScheduler": "tcd"}
FEW = "_few_steps"
"""The key of a scheduler's config that holds the steps of a progressively distilled student.

diffusers leaves out what begins with an underscore; the config's class is one of `HALVED`.
"""
HALVED = {
    "DDIMScheduler": "ddim",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpm_solver_1",
}
PLAIN = ("dpmpp_2m", 25, 3.0)
"""Sampler, steps and guidance of a model that is no few-step student, where nothing else is asked for."""


@dataclass(frozen=True)
class FewSteps:
    """A student's sampler and the number of solver steps whose times it was trained at; `guided`: guidance is inside.

    `steps`: those to draw with where nothing else is asked for. `halved`: made for these alone, at its own scheduler's
    times. Read from the keys of diffusers' schedulers.
    """

    sampler: str
    original: int
    guided: bool
    steps: int = 4
    halved: bool = False

    def times(self, schedule: Schedule, steps: int) -> list[float] | None:
        """The times of `steps` steps, a subset of those trained at; None for more steps, or where times are real."""
        if steps > self.original or not schedule.discrete:
            return None
        return subset(schedule, steps, self.original)


def few_steps(config: Mapping[str, Any], guided: bool) -> FewSteps | None:
    """From a scheduler's config; None when it is not of a few-step sampler."""
    cls = str(config.get("_class_name"))
    if cls in HALVED and isinstance(steps := config.get(FEW), int) and steps > 0:
        return FewSteps(HALVED[cls], steps, guided, steps, halved=True)
    sampler = SAMPLERS.get(cls)
    return None if sampler is None else FewSteps(sampler, int(config.get("original_inference_steps") or 50), guided)


def beside(folder: Path, guided: bool = True) -> FewSteps | None:
    """Of a LoRA's folder, by the scheduler's config in it; None without one. `guided`: its base is told no guidance."""
    path = folder / "scheduler_config.json"
    return few_steps(json.loads(path.read_text(encoding="utf-8")), guided) if path.is_file() else None


def choose(
    own: FewSteps | None,
    sampler: str | None,
    steps: int | None,
    guidance: float | None,
    habit: tuple[str, int, float] = PLAIN,
) -> tuple[str, int, float]:
    """How to draw where some of it is left open (None): a student's sampler and steps; guidance 1 if it is inside.

    `habit`: of a model that is no student.
    """
    plain = habit if own is None else (own.sampler, own.steps, 1.0 if own.guided else habit[2])
    return (
        plain[0] if sampler is None else sampler,
        plain[1] if steps is None else steps,
        plain[2] if guidance is None else guidance,
    )
