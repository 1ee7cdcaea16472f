"""Weights of multistep formulas: exact integrals of Lagrange polynomials, in float64 Python numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np


@functools.lru_cache(maxsize=4)
def _gauss(count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    points, parts = np.polynomial.legendre.leggauss(count)
    return tuple(points.tolist()), tuple(parts.tolist())


def lagrange(points: Sequence[float], j: int, at: float) -> float:
    """The polynomial that is 1 at points[j] and 0 at the others, read at `at`."""
    return math.prod((at - p) / (points[j] - p) for k, p in enumerate(points) if k != j)


def weights(
    points: Sequence[float],
    start: float,
    stop: float,
    density: Callable[[float], float] | None = None,
    count: int = 16,
) -> list[float]:
    """Integral from start to stop of each Lagrange polynomial on `points`, times `density`.

    Gauss-Legendre of `count` points: exact for polynomials, and to rounding for the smooth densities used here.
    """
    middle, half = (start + stop) / 2, (stop - start) / 2
    nodes, parts = _gauss(count)
    at = [middle + half * n for n in nodes]
    scale = [half * p * (density(v) if density else 1.0) for p, v in zip(parts, at)]
    return [sum(s * lagrange(points, j, v) for s, v in zip(scale, at)) for j in range(len(points))]
