"""Tests of which only the device differs: one body, on the CPU always, on a card where there is one (marked `gpu`)."""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests import ranks

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _kept(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    buffer = io.BytesIO()  # tensors as bytes: a handle of shared memory would die with this process
    torch.save(function(*args), buffer)
    return buffer.getvalue()


def alone(device: str, function: Callable[..., Any], *args: Any, timeout: float = 240) -> Any:
    """`function(device, *args)` as the one rank of a group in a process of its own; tensors come back on the CPU.

    The function must be importable. On a card the process is a fresh one, as CUDA works in no fork, and makes its group
    by NCCL itself. The engine takes a card where there is one: there the CPU's form is skipped.
    """
    if device == "cpu":
        if torch.cuda.is_available():
            pytest.skip("a process takes the card that is there")
        return ranks.run(function, 1, device, *args, timeout=timeout)[0]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        kept = pool.apply_async(_kept, (function, (device, *args))).get(timeout)
    return torch.load(io.BytesIO(kept), map_location="cpu", weights_only=False)
