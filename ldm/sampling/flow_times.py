"""The times that published flow schedulers visit: where they begin and end, how they are shifted, stretched and spaced.

Legend: N steps, T training times, sigma = t / T in [0, 1], s(.) the flow's shift. Grids, before the shift:

"flow": N points from 1 to s(1/T), which s then shifts a second time (SD3; FlowMatchEuler of its own accord).
"flow_once": N points from 1 to 1/T (the same where the shift is dynamic).
"flow_open": 1, ..., 1/N (FLUX.1, FLUX.2, Z-Image, Qwen-Image, whose pipelines give their own sigmas).
"flow_dpm": N + 1 points from 1 - 1/T to 0 without the last (DPM-Solver and DEIS with `use_flow_sigmas`).
"flow_unipc": N + 1 points from 1 to 1/T without the last; a first sigma of 1 is 1e-6 less (UniPC).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

from ldm.diffusion.schedule import Flow
from ldm.sampling.times import between, check_steps, check_times, stretched

Spread = Literal["karras", "exponential", "beta"]
"""How sigmas are spaced between their first and their last: EDM's eq. 5, even in the logarithm, a beta distribution."""


def flow_times(schedule: Flow, steps: int, grid: str, spread: Spread | None = None) -> list[float]:
    """`steps` decreasing times of a flow. Raises ValueError for an unknown grid and for steps below 1."""
    if grid not in FLOW_GRIDS:
        raise ValueError(f"grid {grid!r} is not one of {sorted(FLOW_GRIDS)}")
    check_steps(schedule, steps)
    total = schedule.steps
    sigmas = [schedule.warp(total * u) / total for u in FLOW_GRIDS[grid](schedule, steps)]
    sigmas = stretched(sigmas, schedule.terminal)
    if grid == "flow_unipc" and abs(sigmas[0] - 1) < 1e-6:
        sigmas[0] = float(np.float32(sigmas[0] - 1e-6))  # theirs are float32, which matters to log(1 - sigma)
    if spread == "beta":
        low, high = sigmas[-1], sigmas[0]
        places = [1 - i / max(steps - 1, 1) for i in range(steps)]
        sigmas = [low + (high - low) * beta_quantile(p, 0.6) for p in places]
    elif spread is not None:
        sigmas = between(sigmas[0], sigmas[-1], steps, spread)
    return check_times(schedule, [min(total * s, schedule.last) for s in sigmas])


def beta_quantile(p: float, a: float) -> float:
    """The inverse distribution function of the symmetric beta distribution B(a, a) at p in [0, 1], for a below 1."""
    if p > 0.5:
        return 1 - beta_quantile(1 - p, a)
    whole = a * math.gamma(a) ** 2 / math.gamma(2 * a)
    power = p * whole  # in y = x^a the distribution function is nearly a line: Newton's method needs few steps
    for _ in range(30):
        x = power ** (1 / a)
        move = (_beta_series(x, a) * power / whole - p) * whole * (1 - x) ** (1 - a)
        power -= move
        if abs(move) <= 1e-16 * power:
            break
    return power ** (1 / a)


def _beta_series(x: float, a: float) -> float:
    """2F1(a, 1 - a; a + 1; x), which times x^a / (a B(a, a)) is the distribution function; for x up to about 1/2."""
    total, term = 0.0, 1.0
    for n in range(200):
        part = term * a / (a + n)
        total += part
        if part < 1e-17:
            break
        term *= (1 - a + n) * x / (n + 1)
    return total


def _twice(schedule: Flow, steps: int) -> list[float]:
    # Theirs keep their sigmas in float32, the first training time's too; so that ours are the same digit by digit.
    shift, one = schedule.shift, torch.ones(()) / schedule.steps
    return np.linspace(1.0, float(shift * one / (1 + (shift - 1) * one)), steps).tolist()


def _once(schedule: Flow, steps: int) -> list[float]:
    return np.linspace(1.0, float(torch.ones(()) / schedule.steps), steps).tolist()


def _open(schedule: Flow, steps: int) -> list[float]:
    return [1 - i / steps for i in range(steps)]


def _dpm(schedule: Flow, steps: int) -> list[float]:
    return np.linspace(1 - 1 / schedule.steps, 0.0, steps + 1).tolist()[:-1]


def _unipc(schedule: Flow, steps: int) -> list[float]:
    return np.linspace(1.0, 1 / schedule.steps, steps + 1).tolist()[:-1]


FLOW_GRIDS: dict[str, Callable[[Flow, int], list[float]]] = {
    "flow": _twice,
    "flow_once": _once,
    "flow_open": _open,
    "flow_dpm": _dpm,
    "flow_unipc": _unipc,
}
