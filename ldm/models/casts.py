"""The type that autocast computes in, also where a planner only says that it would."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_planned: list[torch.dtype] = []


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What products of float32 are computed in on x's device; None without autocast, and for float64."""
    if x.dtype == torch.float64:
        return None
    kind = x.device.type
    if kind == "meta":  # of which torch.autocast knows nothing
        return _planned[-1] if _planned else None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@contextlib.contextmanager
def planned(dtype: torch.dtype) -> Iterator[None]:
    """Inside, tensors of the meta device are computed with as by autocast to `dtype`; float32 is none."""
    if dtype == torch.float32:
        yield
        return
    _planned.append(dtype)
    try:
        yield
    finally:
        _planned.pop()
