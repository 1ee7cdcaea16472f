"""Matrix products by oneDNN on CPUs where PyTorch's own are slower.

PyTorch's float32 products are MKL's, which leaves the AVX512 of AMD's processors unused; its convolutions are oneDNN's,
which does not. There oneDNN takes 0.45 of the time (docs/log.md). Which library computes is chosen by the processor and
not by a measurement, so that a machine's results stay the same bit by bit.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack  # type: ignore[import-not-found]

LEAST = 1 << 23
"""Multiplications of a product below which the library stays PyTorch's: each shape's program takes 0.6 MB to keep."""


@functools.cache
def wins() -> bool:
    """Whether this processor's float32 products are quicker by oneDNN: AMD with AVX512 under MKL."""
    if not (available() and torch.backends.mkl.is_available()):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and made_by("AuthenticAMD")


@functools.cache
def available() -> bool:
    """Whether PyTorch has oneDNN and the operator of it that compiled programs use."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def made_by(vendor: str) -> bool:
    """Whether the processor's description names them."""
    return vendor in _vendor()


def _vendor() -> str:
    told = Path("/proc/cpuinfo")
    return told.read_text(encoding="utf-8", errors="replace")[:4096] if told.is_file() else platform.processor()


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether x W^T is better asked of oneDNN than of PyTorch.

    Not under autocast, nor under a compiler or functions' transforms. A counter of operators changes nothing, as a step
    must be the same with it and without: give it the `formulas`.
    """
    if torch.compiler.is_compiling() or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    return wins() and _plain(x) and weight.device.type == "cpu" and _multiplications(x, weight) >= LEAST


def _multiplications(x: Tensor, weight: Tensor) -> int:
    """Of one of the products of x (..., K) with N rows or columns of K weights, or of (P, M, K) with (P, K, N)."""
    each = weight.numel() // x.shape[-1]
    return x.numel() * each // (len(x) ** 2 if weight.ndim == 3 else 1)


def formulas() -> dict[Any, Callable[..., int]]:
    """Operations of what is asked here, as `FlopCounterMode(custom_mapping=...)` takes them: of shapes."""
    return {torch.ops.mkldnn._linear_pointwise: _operations} if available() else {}


def _operations(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _plain(x: Tensor) -> bool:
    if x.device.type != "cpu" or not x.numel() or torch.is_autocast_enabled("cpu"):
        return False
    return peek_interpreter_stack() is None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for x (..., K) and W (N, K), without gradients."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b of matrices, or of as many matrices one after the other, by whichever is quicker."""
    if (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)) or not takes(a, b):
        return a @ b
    if a.ndim == 2:
        return linear(a, b.T)
    return torch.stack([linear(one, other.T) for one, other in zip(a, b, strict=True)])


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """gelu(x W^T + b) with the tanh approximation, without gradients, in one pass over memory; None where it cannot.

    Computes in float32 and in bfloat16, whose products and sums are float32 before they are rounded.
    """
    if torch.is_grad_enabled() or not available() or not _plain(x) or x.dtype != weight.dtype:
        return None
    if not (x.dtype == torch.float32 and wins()) and not (x.dtype == torch.bfloat16 and _has_bfloat16()):
        return None
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")


@functools.cache
def _has_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
