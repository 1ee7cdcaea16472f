"""Curves of quality over processor seconds, the seconds until a quality, and their ratio. Pure arithmetic."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Bound = Literal["", "at most", "at least"]


@dataclass(frozen=True)
class Measure:
    """A figure of a point: where it is, which way is better, and which judge it hangs on ("" none)."""

    key: str
    title: str
    path: tuple[str, ...]
    higher: bool
    judge: str = ""
    scale: float = 1.0
    form: str = "{:.3f}"


MEASURES = (
    Measure("train", "R@1, training captions", ("train", "retrieval", "rate"), True, "clip_emoji"),
    Measure("unseen", "R@1, unseen combinations", ("unseen", "retrieval", "rate"), True, "clip_emoji"),
    Measure(
        "kernel", "kernel distance x 1000", ("train", "kernel_distance", "mean"), False, "efficientnet_lite0", 1e3,
        "{:.1f}",
    ),
    Measure("error", "velocity error, held out", ("velocity_error", "mean"), False, form="{:.4f}"),
)  # fmt: skip


@dataclass(frozen=True)
class Reached:
    """Seconds until a quality. `bound` "at most": the first point has it already; "at least": the last has it not."""

    seconds: float
    bound: Bound = ""


def reach(points: Sequence[tuple[float, float]], target: float, *, higher: bool) -> Reached:
    """When a curve of (seconds, quality) first reaches `target`, linear in log(seconds) between its points.

    Raises ValueError for no points, and for seconds that are not above 0 and rising.
    """
    if not points or any(b[0] <= a[0] for a, b in itertools.pairwise(points)) or points[0][0] <= 0:
        raise ValueError(f"expected points of rising seconds above 0, got {list(points)}")
    sign = 1.0 if higher else -1.0
    gains = [sign * (quality - target) for _, quality in points]
    for i, gain in enumerate(gains):
        if gain < 0:
            continue
        if i == 0:
            return Reached(points[0][0], "" if gain == 0 else "at most")
        part = gains[i - 1] / (gains[i - 1] - gain)
        low, high = math.log(points[i - 1][0]), math.log(points[i][0])
        return Reached(math.exp(low + part * (high - low)))
    return Reached(points[-1][0], "at least")


def ratio(seconds: float, reached: Reached) -> tuple[float, Bound]:
    """How many times sooner than `seconds`; a bound on the time is the other bound on it."""
    other: dict[Bound, Bound] = {"": "", "at most": "at least", "at least": "at most"}
    return seconds / reached.seconds, other[reached.bound]


@dataclass(frozen=True)
class Cell:
    """A recipe at a mark: each seed's seconds and value."""

    seeds: tuple[int, ...]
    seconds: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def at(self) -> float:
        return statistics.fmean(self.seconds)

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds; None for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


Curve = dict[float, Cell]
"""By mark, rising."""


def value(point: Mapping[str, Any], measure: Measure) -> float:
    """The figure of a point."""
    found: Any = point
    for key in measure.path:
        found = found[key]
    return measure.scale * float(found)


def ends(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Points that are results: a run's end, and without decay all on the way, with which shorter runs would end."""
    return [p for p in record["points"] if p["end"] or record["prefix"]]


def curve(records: Sequence[Mapping[str, Any]], measure: Measure) -> Curve:
    """The results of one recipe's runs, by mark, over seeds. A run that ended there counts before one that passed."""
    found: dict[float, dict[int, tuple[float, float]]] = {}
    for record in sorted(records, key=lambda r: -r["budget"]):
        for point in ends(record):
            if point["end"] or record["seed"] not in found.get(point["mark"], {}):
                pair = (point["seconds"], value(point, measure))
                found.setdefault(point["mark"], {})[record["seed"]] = pair
    return {
        mark: Cell(tuple(seeds), tuple(s for s, _ in seeds.values()), tuple(v for _, v in seeds.values()))
        for mark, seeds in sorted(found.items())
    }


def best(curves: Mapping[str, Curve], mark: float, measure: Measure) -> str | None:
    """The row that is best at a mark; None where none was measured there."""
    there = {name: c[mark].mean for name, c in curves.items() if mark in c}
    if not there:
        return None
    return max(there, key=lambda name: there[name] * (1 if measure.higher else -1))


@dataclass(frozen=True)
class Sooner:
    """Of a recipe: the seconds until a quality of its mean curve, and each seed's own."""

    reached: Reached
    ratio: float
    bound: Bound
    seeds: tuple[Reached, ...]


def sooner(own: Curve, seconds: float, target: float, measure: Measure) -> Sooner:
    """Against a quality that the common recipe has after `seconds`."""
    ends = sorted((c.at, c.mean) for c in own.values())  # tiny budgets may end in another order
    reached = reach(ends, target, higher=measure.higher)
    shared = sorted(set.intersection(*(set(c.seeds) for c in own.values())))
    places = [[(c, c.seeds.index(seed)) for c in own.values()] for seed in shared]
    own_ends = [sorted((c.seconds[i], c.values[i]) for c, i in of) for of in places]
    each = tuple(reach(ends, target, higher=measure.higher) for ends in own_ends)
    told, bound = ratio(seconds, reached)
    return Sooner(reached, told, bound, each)
