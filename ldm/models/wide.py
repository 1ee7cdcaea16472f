"""Products of half precision on CPUs without instructions for them: in float32, which is several times as fast there.

What is given and kept is of half precision all the same; only the products, and weights that are float32 anyway, are
not rounded in between.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 8
"""Fewer rows do not pay for widening a matrix of weights (measured on AVX2: docs/log.md)."""


@functools.cache
def emulates(dtype: torch.dtype) -> bool:
    """Whether this CPU has no products of a half-precision type of its own."""
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def half_of(x: Tensor) -> torch.dtype | None:
    """The half-precision type in which a product of x would be emulated; None where it would not be."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype if emulates(dtype) and x.dtype != torch.float64 else None


class Linear(nn.Linear):
    """A linear layer whose half-precision products are not emulated."""

    def forward(self, x: Tensor) -> Tensor:
        half = half_of(x)
        if half is None or (self.weight.dtype != torch.float32 and x.numel() < FEW * x.shape[-1]):
            return super().forward(x)
        return linear(x, self.weight, self.bias, half)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, half: torch.dtype) -> Tensor:
    """x W^T + b of x (..., D) rounded to `half`, added up in float32, given in `half`."""
    x = x.to(half)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight, bias)  # type: ignore[return-value]
    return _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            grad = grads[0].float().flatten(0, -2)
            of_x = of_weight = of_bias = None
            if ctx.needs_input_grad[0]:
                of_x = (grad @ weight.float()).to(x.dtype).view_as(x)
            if ctx.needs_input_grad[1]:
                of_weight = (grad.T @ x.flatten(0, -2).float()).to(weight.dtype)
            if bias is not None and ctx.needs_input_grad[2]:
                of_bias = grad.sum(0).to(bias.dtype)
        return of_x, of_weight, of_bias
