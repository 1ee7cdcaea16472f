"""Seconds and memory of a step on either device."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.timing import Spread

MOST = 20
GB = 1e9


def fresh(device: str) -> None:
    """Give back what the row before held, and count its peak no more."""
    import torch._dynamo

    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def timed(step: Callable[[], object], device: str, seconds: float, least: int = 2) -> list[float]:
    """Seconds of each of as many steps as fit into the time, at least so many, at most 20; warm up before.

    On CUDA between events after the steps, so that what the host does meanwhile counts where it holds the card up.
    """
    if device != "cuda":
        return _clocked(step, seconds, least)
    marks = [torch.cuda.Event(enable_timing=True)]
    torch.cuda.synchronize()
    began = time.perf_counter()
    marks[0].record()
    while len(marks) <= MOST and (len(marks) <= least or time.perf_counter() - began < seconds):
        step()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        marks.append(mark)
        if len(marks) % 2:  # the host must not run far ahead of the clock that ends the loop
            mark.synchronize()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]


def _clocked(step: Callable[[], object], seconds: float, least: int) -> list[float]:
    found: list[float] = []
    while len(found) < MOST and (len(found) < least or sum(found) < seconds):
        began = time.perf_counter()
        step()
        found.append(time.perf_counter() - began)
    return found


def spread(seconds: list[float]) -> dict[str, Any]:
    """Median and quartiles of steps, and how many there were."""
    return Spread.of(seconds).record() | {"steps": len(seconds)}


def memory(device: str) -> dict[str, float | None]:
    """GB at the fullest moment: of tensors, and as the allocator took it from the card."""
    if device != "cuda":
        return {"peak_gb": None, "reserved_gb": None}
    return {
        "peak_gb": torch.cuda.max_memory_allocated() / GB,
        "reserved_gb": torch.cuda.max_memory_reserved() / GB,
    }
