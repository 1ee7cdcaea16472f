"""Interleaved timing: what is compared runs in turns, so that a machine that slows down slows both."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Options:
    """`quick` runs the smallest size, to see that it runs; its figures mean nothing."""

    quick: bool = False
    threads: int = 1
    rounds: int | None = None
    precision: str = "auto"

    def times(self, full: int) -> int:
        """How many timed rounds."""
        return self.rounds or (2 if self.quick else full)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) < 2:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)

    def record(self) -> dict[str, float]:
        """Plain data."""
        return {"median": self.median, "quartile_1": self.low, "quartile_3": self.high}


Seconds = dict[str, list[float]]
"""Seconds of each round, by case."""


def interleaved(cases: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> Seconds:
    """Run every case once a round, each round in the opposite order of the one before."""
    for _ in range(warmup):
        for case in cases.values():
            case()
    seconds: Seconds = {name: [] for name in cases}
    names = list(cases)
    for i in range(rounds):
        for name in names if i % 2 == 0 else reversed(names):
            began = time.perf_counter()
            cases[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: Seconds, a: str, b: str) -> Spread:
    """Time of `a` over time of `b`, round by round."""
    return Spread.of([x / y for x, y in zip(seconds[a], seconds[b], strict=True)])


def report(title: str, seconds: Seconds, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Print medians and the ratios of pairs (a over b), and give them as plain data."""
    rounds = len(next(iter(seconds.values())))
    print(f"{title}  ({rounds} rounds, interleaved; median, quartiles)")
    for name, values in seconds.items():
        s = Spread.of(values)
        print(f"  {name:<34} {s.median * 1e3:10.2f} ms   {s.low * 1e3:.2f} .. {s.high * 1e3:.2f}")
    ratios = {f"{a} / {b}": ratio(seconds, a, b) for a, b in pairs}
    for name, s in ratios.items():
        print(f"  {name:<34} {s.median:10.3f}      {s.low:.3f} .. {s.high:.3f}   ({(s.median - 1) * 100:+.1f} %)")
    return {
        "rounds": rounds,
        "seconds": {name: Spread.of(values).record() for name, values in seconds.items()},
        "ratios": {name: s.record() for name, s in ratios.items()},
    }


def pin(threads: int) -> list[int]:
    """Bind this process to its first `threads` cores; ValueError if it may not use that many."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(allowed):
        raise ValueError(f"threads: {threads} is not between 1 and the {len(allowed)} cores that this process may use")
    os.sched_setaffinity(0, allowed[:threads])
    return allowed[:threads]


def processor() -> str:
    """Its name, with family and model where the kernel tells: makers give one name to several generations."""
    info = Path("/proc/cpuinfo")
    told: dict[str, str] = {}
    for line in info.read_text().splitlines() if info.is_file() else []:
        key, _, value = line.partition(":")
        told.setdefault(key.strip(), value.strip())
    name = told.get("model name") or platform.processor()
    if "cpu family" in told and "model" in told:
        name += f" (family {told['cpu family']}, model {told['model']})"
    return name


def machine(threads: int, cores: Sequence[int]) -> dict[str, Any]:
    """What the figures were measured on, with the load that was there before."""
    import torch

    load = os.getloadavg() if hasattr(os, "getloadavg") else (0.0,)
    return {
        "cpu": processor(),
        "cores_of_machine": os.cpu_count(),
        "threads": threads,
        "pinned_to": list(cores),
        "load_before": round(load[0], 2),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
