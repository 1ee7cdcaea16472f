"""Which times a sampler visits: decreasing lists of (possibly fractional) training times.

Spacings: "leading" (multiples of T // steps), "trailing" (from the last time, arXiv 2305.08891), "linspace" (both ends
included, rounded), "even" (the same, not rounded: k-diffusion), "open" (steps + 1 even points without the last:
DPM-Solver), "quadratic" (DDIM, appendix D), "lcm" (a subset of 50 leading-edge times), "karras" (EDM, eq. 5),
"exponential" (even in log-SNR), "ays" (the shape published for Stable Diffusion 1.5 by Align Your Steps,
arXiv 2404.14507, interpolated).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from ldm.diffusion.schedule import Flow, Schedule
from ldm.words import near

_AYS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
_CEILING = 4096.0  # sigma / alpha where alpha is 0; alpha_bar = 2^-24


def times(
    schedule: Schedule, steps: int, spacing: str = "trailing", *, offset: int = 0, rho: float = 7.0
) -> list[float]:
    """`steps` strictly decreasing times, noisiest first. `offset` is added to "leading" as far as T allows.

    Raises ValueError for an unknown spacing (naming all) and for steps below 1 or, on a discrete schedule, above T.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing {spacing!r} is not one of {sorted(SPACINGS)}{near(spacing, SPACINGS)}")
    check_steps(schedule, steps)
    if spacing in ("karras", "exponential", "ays"):
        return _by_noise(schedule, _NOISE[spacing](schedule, steps, rho))
    if schedule.discrete:
        return check_times(schedule, SPACINGS[spacing](schedule.steps, steps, offset))
    values = [schedule.warp(schedule.last * u) for u in _even_flow(steps)]
    if isinstance(schedule, Flow) and schedule.terminal is not None:
        values = [schedule.last * s for s in stretched([v / schedule.last for v in values], schedule.terminal)]
    return check_times(schedule, values)


def stretched(sigmas: list[float], terminal: float | None) -> list[float]:
    """Decreasing noise levels, 1 - sigma multiplied so that the last is `terminal` (LTX-Video's `shift_terminal`)."""
    if terminal is None or len(sigmas) == 1:
        return sigmas
    factor = (1 - terminal) / (1 - sigmas[-1])
    return [1 - (1 - s) * factor for s in sigmas]


def check_steps(schedule: Schedule, steps: int) -> None:
    """Raise ValueError for a number of steps that the schedule cannot give."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
    if schedule.discrete and steps > schedule.steps:
        raise ValueError(f"steps must be at most the schedule's {schedule.steps}, got {steps}")


def check_times(schedule: Schedule, values: Sequence[float]) -> list[float]:
    """The times as floats. Raises ValueError unless strictly decreasing and within the schedule."""
    values = [float(v) for v in values]
    if not values:
        raise ValueError("times must not be empty")
    for before, after in itertools.pairwise(values):
        if not after < before:
            raise ValueError(f"times must be strictly decreasing, got {before:g} then {after:g}")
    if values[0] > schedule.last or values[-1] < schedule.first or math.isnan(values[0]):
        raise ValueError(
            f"times must lie in [{schedule.first:g}, {schedule.last:g}], got {values[0]:g} to {values[-1]:g}"
        )
    return values


def noise_ratio(schedule: Schedule, t: float) -> float:
    """sigma / alpha at t, at most 4096 (where alpha is 0 it has no value)."""
    alpha, sigma = schedule.at(t)
    return min(sigma / alpha, _CEILING) if alpha > 0 else _CEILING


def _leading(total: int, steps: int, offset: int) -> list[float]:
    stride = total // steps
    offset = min(offset, total - 1 - (steps - 1) * stride)  # T steps with offset 1 would ask for time T
    return [float(i * stride + offset) for i in reversed(range(steps))]


def _trailing(total: int, steps: int, offset: int) -> list[float]:
    return [float(round(total * (1 - i / steps)) - 1) for i in range(steps)]


def _linspace(total: int, steps: int, offset: int) -> list[float]:
    return [float(round(v)) for v in _even(total, steps, offset)]


def _even(total: int, steps: int, offset: int) -> list[float]:
    if steps == 1:
        return [float(total - 1)]
    return [(total - 1) * (steps - 1 - i) / (steps - 1) for i in range(steps)]


def _open(total: int, steps: int, offset: int) -> list[float]:
    if steps == total:  # rounding steps + 1 points would repeat one
        return [float(i) for i in reversed(range(total))]
    return [float(round((total - 1) * (steps - i) / steps)) for i in range(steps)]


def _quadratic(total: int, steps: int, offset: int) -> list[float]:
    if steps == 1:
        return [float(int(0.8 * total))]
    values = [int((math.sqrt(0.8 * total) * i / (steps - 1)) ** 2) for i in range(steps)]
    for i in range(1, steps):  # the first squares may coincide
        values[i] = max(values[i], values[i - 1] + 1)
    top = total - 1
    for i in reversed(range(steps)):
        values[i], top = min(values[i], top), min(values[i], top) - 1
    return [float(v) for v in reversed(values)]


def subset(schedule: Schedule, steps: int, original: int) -> list[float]:
    """`steps` of the times that a solver of `original` steps visits, as evenly as they go, the noisiest first.

    Raises ValueError unless 1 <= steps <= original <= T.
    """
    if not 1 <= steps <= original <= schedule.steps:
        raise ValueError(f"steps must lie in [1, {original}], the student's own times, got {steps}")
    return check_times(schedule, _subset(schedule.steps, steps, original))


def _lcm(total: int, steps: int, offset: int) -> list[float]:
    return _subset(total, steps, max(50, steps) if total >= 50 else total)


def _subset(total: int, steps: int, original: int) -> list[float]:
    stride = total // original
    grid = [(i + 1) * stride - 1 for i in reversed(range(original))]
    return [float(grid[i * original // steps]) for i in range(steps)]


def _even_flow(steps: int) -> list[float]:
    """1, ..., 1 / steps; the end 0 is the data."""
    return [1 - i / steps for i in range(steps)]


def between(high: float, low: float, steps: int, spacing: str, rho: float = 7.0) -> list[float]:
    """`steps` values of sigma / alpha from `high` to `low`, spaced "karras" (EDM, eq. 5) or "exponential"."""
    part = [i / max(steps - 1, 1) for i in range(steps)]
    if spacing == "exponential":
        return [high * (low / high) ** p for p in part]
    return [(high ** (1 / rho) + p * (low ** (1 / rho) - high ** (1 / rho))) ** rho for p in part]


def _karras(schedule: Schedule, steps: int, rho: float) -> list[float]:
    return between(*_range(schedule), steps, "karras", rho)


def _exponential(schedule: Schedule, steps: int, rho: float) -> list[float]:
    return between(*_range(schedule), steps, "exponential")


def _ays(schedule: Schedule, steps: int, rho: float) -> list[float]:
    """The published curve, read at steps + 1 points without the last and stretched to this schedule's range."""
    high, low = _range(schedule)
    logs = [math.log(s) for s in _AYS]
    values = []
    for i in range(steps):
        place = i * (len(logs) - 1) / steps
        at = int(place)
        value = logs[at] + (place - at) * (logs[at + 1] - logs[at])
        fraction = (logs[0] - value) / (logs[0] - logs[-1])
        values.append(high * (low / high) ** fraction)
    return values


def _range(schedule: Schedule) -> tuple[float, float]:
    """The largest and smallest sigma / alpha that log-SNR spacings use."""
    low = noise_ratio(schedule, schedule.first)
    return noise_ratio(schedule, schedule.last), low if low > 0 else 1e-3


def _by_noise(schedule: Schedule, ratios: list[float]) -> list[float]:
    values = [schedule.time(-math.log(r)) for r in ratios]
    values[0] = schedule.last
    return check_times(schedule, values)


_NOISE: dict[str, Callable[[Schedule, int, float], list[float]]] = {
    "karras": _karras,
    "exponential": _exponential,
    "ays": _ays,
}
SPACINGS: dict[str, Callable[[int, int, int], list[float]]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "even": _even,
    "open": _open,
    "quadratic": _quadratic,
    "lcm": _lcm,
    "karras": _even,
    "exponential": _even,
    "ays": _even,
}
"""Discrete-time spacings by name; the last three are spaced by noise and work on every schedule."""
