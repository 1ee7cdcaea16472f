"""Closed forms of large runs: links, stragglers, failures. Times in seconds, sizes in bytes."""

from __future__ import annotations

import math

EULER = 0.5772156649015329


def ring(size: float, ranks: int, rate: float) -> float:
    """A reduce-scatter or an all-gather of `size` bytes around a ring: (N-1)/N of them pass every link."""
    return size * (ranks - 1) / ranks / rate


def largest_of_normals(ranks: int) -> float:
    """The mean of the largest of N standard normals, by its Gumbel limit; 0 for one rank.

    Location and scale as in Cramér 1946, section 28.6.
    """
    if ranks < 2:
        return 0.0
    root = math.sqrt(2 * math.log(ranks))
    location = root - (math.log(math.log(ranks)) + math.log(4 * math.pi)) / (2 * root)
    return max(0.0, location + EULER / root)


def largest_of_exponentials(ranks: int) -> float:
    """The mean of the largest of N exponentials of mean 1: the harmonic number H_N."""
    return sum(1 / k for k in range(1, ranks + 1))


def young(cost: float, failures: float) -> float:
    """The best time between checkpoints of `cost`, to first order (Young 1974): sqrt(2 cost MTBF)."""
    return math.sqrt(2 * cost * failures)


def daly(cost: float, failures: float) -> float:
    """The same to higher order (Daly 2006, equation 37); the MTBF itself when saving costs more than twice that."""
    if cost >= 2 * failures:
        return failures
    part = cost / (2 * failures)
    return math.sqrt(2 * cost * failures) * (1 + math.sqrt(part) / 3 + part / 9) - cost


def wall_time(work: float, interval: float, cost: float, restart: float, failures: float) -> float:
    """Expected time for `work` under exponential failures of mean `failures` (Daly 2006, equation 20).

    A checkpoint of `cost` follows each `interval` of work; a failure loses what follows the last one, and `restart`.
    """
    return failures * math.exp(restart / failures) * math.expm1((interval + cost) / failures) * work / interval


def goodput(interval: float, cost: float, restart: float, failures: float) -> float:
    """Share of the time that becomes progress."""
    return 1 / wall_time(1.0, interval, cost, restart, failures)
