"""The schedulers of diffusers that draw students as they were trained."""

from __future__ import annotations

from typing import Any

from ldm.checkpoint.scheduler_classes import FlowGrid
from ldm.checkpoint.schedulers import flow_solver, scheduler_to_diffusers
from ldm.checkpoint.students import FEW
from ldm.diffusion.process import Process
from ldm.diffusion.schedule import Flow
from ldm.objectives.consistency import ConsistencyOptions
from ldm.objectives.progressive import ProgressiveOptions
from ldm.objectives.trajectory import TrajectoryOptions
from ldm.recipes.distill_task import Method


def student_scheduler(method: Method, process: Process, grid: FlowGrid = "flow") -> dict[str, Any]:
    """The diffusers scheduler that samples the student as it was trained. Raises ValueError where there is none.

    `grid`: whose sigmas the family's pipeline takes for a flow.
    """
    if isinstance(process.schedule, Flow):
        if isinstance(method, TrajectoryOptions):
            raise ValueError(
                "method.kind: 'tcd', but its sampler in diffusers knows no flow; lcm, dmd and progressive do"
            )
        plain = scheduler_to_diffusers(process.schedule, process.prediction)
        if isinstance(method, ProgressiveOptions):
            return _halved_flow(method, process.schedule, plain, grid)
        return plain | {"_class_name": "FlowMatchLCMScheduler"}
    if isinstance(method, ProgressiveOptions):
        own = {"timestep_spacing": "trailing", "steps_offset": 0, "set_alpha_to_one": True} | _few(method)
        return scheduler_to_diffusers(process.schedule, process.prediction) | own
    if isinstance(method, TrajectoryOptions):
        plain = scheduler_to_diffusers(process.schedule, process.prediction, "TCDScheduler")
        return plain | {
            "original_inference_steps": method.solver_steps,
            "timestep_spacing": "leading",
            "steps_offset": 0,
        }
    plain = scheduler_to_diffusers(process.schedule, process.prediction, "LCMScheduler")
    plain |= {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True}
    scaling = method.scaling if isinstance(method, ConsistencyOptions) else 10.0
    return plain | {"original_inference_steps": method.solver_steps, "timestep_scaling": scaling}


def _halved_flow(method: ProgressiveOptions, schedule: Flow, plain: dict[str, Any], grid: FlowGrid) -> dict[str, Any]:
    """Euler's scheduler where the pipeline gives the sigmas 1 ... 1/N; else one that has such sigmas by itself.

    Euler's own sigmas end near the data in any number of steps, so that those of N steps are none of those of 2N;
    DPM-Solver's of first order, which is the same step, begin at 1 - 1/T and are 1/N apart.
    """
    if grid == "flow_open" or method.stage == "match":
        return plain | _few(method)
    if schedule.dynamic is not None:
        raise ValueError(
            "method.kind: 'progressive', but no scheduler in diffusers visits its times with a dynamic shift"
        )
    return flow_solver(schedule, order=1) | _few(method)


def _few(method: ProgressiveOptions) -> dict[str, Any]:
    return {FEW: method.steps} if method.stage == "halve" else {}


def path_grid(method: Method, process: Process, grid: FlowGrid) -> str | None:
    """The times of a progressive student's sampler where they are not the trailing ones: `_halved_flow`'s."""
    own = isinstance(method, ProgressiveOptions) and method.stage == "halve" and grid == "flow"
    return "flow_dpm" if own and isinstance(process.schedule, Flow) else None


def spacing(method: Method) -> dict[str, Any]:
    """How the pipeline spaces DDIM's times, where that is the student's sampler."""
    return {"spacing": "trailing", "end": "data"} if isinstance(method, ProgressiveOptions) else {}
