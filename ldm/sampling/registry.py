"""The samplers by name, with what a user must know of each, and the one function that runs them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.sampling.run import Clip, Noise, Progress, Run, clamp, nodes
from ldm.sampling.times import check_steps, check_times
from ldm.sampling.times import times as spaced
from ldm.types import Cond, Denoise
from ldm.words import bare, near

Solver = Callable[[Run, Tensor, float], Tensor]
"""(run, start x_T, eta) -> sample."""


@dataclass(frozen=True, kw_only=True)
class SamplerInfo:
    """What the table of samplers shows."""

    name: str
    solve: Solver
    paper: str
    order: int
    stochastic: bool
    cost: float
    """Network calls per step, without guidance."""
    spacing: str = "trailing"
    end: Literal["data", "first"] = "data"
    eta: float = 0.0
    """The default of the sampler's own randomness in `eta_range`."""
    eta_range: tuple[float, float] = (0.0, 0.0)


SAMPLERS: dict[str, SamplerInfo] = {}


def sampler(
    name: str,
    *,
    paper: str,
    order: int,
    stochastic: bool = False,
    cost: float = 1,
    spacing: str = "trailing",
    end: Literal["data", "first"] = "data",
    eta: float = 0.0,
    eta_range: tuple[float, float] = (0.0, 0.0),
) -> Callable[[Solver], Solver]:
    """Enter a solver into `SAMPLERS`."""

    def enter(solve: Solver) -> Solver:
        SAMPLERS[name] = SamplerInfo(
            name=name,
            solve=solve,
            paper=paper,
            order=order,
            stochastic=stochastic,
            cost=cost,
            spacing=spacing,
            end=end,
            eta=eta,
            eta_range=eta_range,
        )
        return solve

    return enter


_OTHERS = {
    "ddimscheduler": "ddim", "ddpmscheduler": "ddpm", "deismultistep": "deis", "deismultistepscheduler": "deis",
    "dpm2": "kdpm2", "dpm_2": "kdpm2", "dpm_adaptive": "dpmpp_2m", "dpm_fast": "dpmpp_2m", "dpm_solver": "dpmpp_2m",
    "dpm_solverpp": "dpmpp_2m", "dpmpp": "dpmpp_2m", "dpmpp_2s_a": "dpmpp_2s", "dpmpp_2s_ancestral": "dpmpp_2s",
    "dpmpp_3m_sde": "dpmpp_3m", "dpmpp_sde": "dpmpp_2m_sde", "dpmsolvermultistepscheduler": "dpmpp_2m",
    "dpmsolversdescheduler": "dpmpp_2m_sde", "dpmsolversinglestepscheduler": "dpmpp_2s", "euler_a": "euler_ancestral",
    "eulerancestraldiscretescheduler": "euler_ancestral", "eulerdiscretescheduler": "euler",
    "heundiscretescheduler": "heun", "ipndm": "plms", "ipndmscheduler": "plms", "kdpm2discretescheduler": "kdpm2",
    "lcmscheduler": "lcm", "lmsdiscretescheduler": "lms", "pndmscheduler": "pndm", "tcdscheduler": "tcd",
    "uni_pc": "unipc", "uni_pc_bh2": "unipc", "unipcmultistepscheduler": "unipc",
}  # fmt: skip
"""What diffusers, k-diffusion, A1111 and ComfyUI call the samplers, or the nearest of them."""


def _plain(name: str) -> str:
    """A sampler's name in other programs without k-diffusion's mark and the words that choose the times."""
    return re.sub(r"_(karras|exponential|gpu|heun)$", "", bare(name).removeprefix("k_").removeprefix("sample_"))


def lookup(name: str) -> SamplerInfo:
    """The sampler of that name. Raises ValueError naming all samplers."""
    if name not in SAMPLERS:
        plain = _plain(name)
        hint = f"; did you mean {plain!r}?" if plain in SAMPLERS else near(plain, SAMPLERS, _OTHERS)
        raise ValueError(f"sampler {name!r} is not one of {sorted(SAMPLERS)}{hint}")
    return SAMPLERS[name]


@torch.no_grad()
def sample(
    name: str,
    denoise: Denoise,
    x: Tensor,
    cond: Cond,
    *,
    schedule: Schedule,
    steps: int,
    noise: Noise,
    eta: float | None = None,
    spacing: str | None = None,
    times: Sequence[float] | None = None,
    clip: float | Clip | None = None,
    progress: Progress | None = None,
    end: Literal["data", "first"] | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Run a sampler from standard normal x (B, C, H, W) and return its estimate of x_0.

    `noise(i)` is the standard normal (B, C, H, W) of step i; deterministic samplers never call it. `times` (strictly
    decreasing) replaces `steps` and `spacing`. `clip` bounds every estimate of x_0: a number, or a function such as
    `dynamic_threshold()`. `start` (latents) begins at its noised version at the first time instead of at pure noise.
    `progress(i, x)` is called after each step. `end`: whether the last step goes to the data or to the schedule's
    first noise level. Raises ValueError for an unknown sampler or spacing, for steps, eta or times out of range, for
    shapes that do not match, and for a network output that is not finite (naming the step).
    """
    info = lookup(name)
    amount = info.eta if eta is None else float(eta)
    low, high = info.eta_range
    if not low <= amount <= high:
        allowed = f"in [{low:g}, {high:g}]" if high > low else f"{low:g}: it has no such choice"
        raise ValueError(f"eta of sampler {name!r} must be {allowed}, got {amount:g}")
    if times is None:
        values = spaced(schedule, steps, spacing or info.spacing)
    else:
        values = check_times(schedule, times)
        check_steps(schedule, len(values))
    if start is not None and start.shape != x.shape:
        raise ValueError(f"start must have the shape of x, {tuple(x.shape)}, got {tuple(start.shape)}")
    bound = clip if clip is None or callable(clip) else clamp(clip)
    path = nodes(schedule, values, end or info.end)
    if start is not None:
        x = path[0].alpha * start.to(x) + path[0].sigma * x
    run = Run(denoise, cond, schedule, path, noise, bound, progress)
    result = info.solve(run, x, amount)
    run.check()
    return result
