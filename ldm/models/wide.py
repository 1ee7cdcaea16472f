"""Linear layers in the products that are quickest on this CPU.

Products of half precision on CPUs without instructions for them are float32's, which is several times as fast there:
what is given and kept is of half precision all the same; only the products, and weights that are float32 anyway, are
not rounded in between. Products of float32 are oneDNN's where it is faster than PyTorch's own.
"""

from __future__ import annotations

import functools
import platform
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models import onednn
from ldm.models.casts import autocast_dtype
from ldm.models.frugal import gated, gated_backward

FEW = 8
"""Fewer rows do not pay for widening a matrix of weights (measured on AVX2: docs/log.md)."""
MANY = 256
"""From so many rows on weights in bfloat16 are widened where the CPU has slow products of its own."""


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


@functools.cache
def slow_bfloat16() -> bool:
    """Whether this CPU's products of bfloat16 are slower than float32's: Intel's with AVX512-BF16 and without AMX."""
    if platform.machine() not in ("x86_64", "AMD64") or emulates(torch.bfloat16) or not onednn.made_by("GenuineIntel"):
        return False
    return hasattr(torch.cpu, "_is_amx_tile_supported") and not torch.cpu._is_amx_tile_supported()


def widens(x: Tensor) -> bool:
    """Whether products of x in bfloat16 are computed in float32 and rounded, which loses less: without gradients."""
    if torch.compiler.is_compiling() or x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return False
    return slow_bfloat16() and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


class Linear(nn.Linear):
    """A linear layer by the quickest products: see above."""

    def forward(self, x: Tensor) -> Tensor:
        half, trains = half_of(x), self._trains(x)
        if half is None and onednn.takes(x, self.weight):
            if trains:
                return _Linear.apply(x, self.weight, self.bias, "")  # type: ignore[return-value]
            return onednn.linear(x, self.weight, self.bias)
        if widens(x) and self.weight.dtype == x.dtype and x.numel() >= MANY * x.shape[-1]:
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)
        half = half or (self._cast(x) if trains else None)
        if half is None or (self.weight.dtype != torch.float32 and x.numel() < FEW * x.shape[-1]):
            return super().forward(x)
        x = x.to(half)
        if trains:
            return _Linear.apply(x, self.weight, self.bias, "")  # type: ignore[return-value]
        return _product(x, self.weight, self.bias)

    def _trains(self, x: Tensor) -> bool:
        """Whether anything before the answer wants a gradient."""
        own = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        return torch.is_grad_enabled() and (x.requires_grad or own)

    def _cast(self, x: Tensor) -> torch.dtype | None:
        """The type that autocast gives float32 weights: its copies of them would be kept for the backward pass."""
        compiles = torch.compiler.is_compiling() or self.weight.dtype != torch.float32
        return None if compiles else autocast_dtype(x)


def quickened(model: nn.Module) -> nn.Module:
    """The same model with its plain linear layers as `Linear`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return model


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """gelu(x) W^T + b, with the tanh approximation; keeps x alone, autograd would keep gelu(x) too.

    Computes in the type of x.
    """
    return _Linear.apply(x, weight, bias, "gelu")  # type: ignore[return-value]


def geglu_linear(both: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(a * gelu(b)) W^T + b for both halves a, b of (..., 2K); keeps `both` alone. Computes in its type."""
    return _Linear.apply(both, weight, bias, "geglu")  # type: ignore[return-value]


def _activated(x: Tensor, activation: str) -> Tensor:
    if activation == "geglu":
        return gated(x)
    return F.gelu(x, approximate="tanh") if activation else x


def _activated_backward(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    if activation == "geglu":
        return gated_backward(grad, x)
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh") if activation else grad


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in the type of x, added up in float32 where its products would be emulated."""
    with _own_precision(x):
        to = _adds_in(x, x.numel() * len(weight))
        wide, weight = x.to(to), _computed(weight, x.dtype, to)
        bias = None if bias is None else _computed(bias, x.dtype, to)
        product = onednn.linear if onednn.takes(wide, weight) else F.linear
        return product(wide, weight, bias).to(x.dtype)


def _own_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Without autocast, which plans' tensors of no memory know nothing of."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _adds_in(x: Tensor, multiplications: int) -> torch.dtype:
    """What products of x are computed in: on CPUs float32 where half precision is emulated, and where they are small.

    A product in half precision is a program of oneDNN's for each shape, which takes about 0.9 MB to keep.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return x.dtype
    return torch.float32 if multiplications < onednn.LEAST or emulates(x.dtype) else x.dtype


def _computed(weight: Tensor, dtype: torch.dtype, to: torch.dtype) -> Tensor:
    """A weight in the type of a product; rounded to the type that was asked for, unless that is emulated."""
    return weight.to(to) if to == dtype or emulates(dtype) else weight.to(dtype).to(to)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        return _product(_activated(x, activation), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.activation = inputs
        ctx.shape, ctx.dtype = x.shape, x.dtype
        needed = ctx.activation or ctx.needs_input_grad[1]  # for a frozen layer the weights are enough
        ctx.save_for_backward(x if needed else None, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        with _own_precision(grads[0]):
            to = _adds_in(grads[0], grads[0].numel() * weight.shape[1])
            grad = grads[0].to(to).reshape(-1, grads[0].shape[-1])
            if ctx.needs_input_grad[1]:
                given = _activated(x, ctx.activation)
                of_weight = onednn.product(grad.T, given.reshape(-1, given.shape[-1]).to(to)).to(weight.dtype)
            if bias is not None and ctx.needs_input_grad[2]:
                of_bias = grad.sum(0).to(bias.dtype)
            if ctx.needs_input_grad[0]:
                whole = _computed(weight, grads[0].dtype, to)
                of_x = onednn.product(grad, whole).view(*ctx.shape[:-1], weight.shape[1]).to(ctx.dtype)
                of_x = _activated_backward(of_x, x, ctx.activation)
        return of_x, of_weight, of_bias, None
