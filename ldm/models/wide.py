"""Linear layers in the products that are quickest on this CPU.

Products of half precision on CPUs without instructions for them are float32's, which is several times as fast there:
what is given and kept is of half precision all the same; only the products, and weights that are float32 anyway, are
not rounded in between. Products of float32 are oneDNN's where it is faster than PyTorch's own.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models import onednn

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
    """A linear layer by the quickest products: see above."""

    def forward(self, x: Tensor) -> Tensor:
        half = half_of(x)
        if half is None and onednn.takes(x, self.weight):
            if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
                return _Linear.apply(x, self.weight, self.bias, False)  # type: ignore[return-value]
            return onednn.linear(x, self.weight, self.bias)
        if half is None or (self.weight.dtype != torch.float32 and x.numel() < FEW * x.shape[-1]):
            return super().forward(x)
        x = x.to(half)
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return _Linear.apply(x, self.weight, self.bias, False)  # type: ignore[return-value]
        return _product(x, self.weight, self.bias)


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
    return _Linear.apply(x, weight, bias, True)  # type: ignore[return-value]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in the type of x, added up in float32 where its products would be emulated."""
    with _own_precision(x):
        to = _adds_in(x)
        wide, weight, bias = x.to(to), weight.to(to), None if bias is None else bias.to(to)
        product = onednn.linear if onednn.takes(wide, weight) else F.linear
        return product(wide, weight, bias).to(x.dtype)


def _own_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Without autocast, which plans' tensors of no memory know nothing of."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _adds_in(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "cpu" and emulates(x.dtype) else x.dtype


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        return _product(F.gelu(x, approximate="tanh") if gelu else x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.gelu = inputs
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        with _own_precision(x):
            to = _adds_in(x)
            grad = grads[0].to(to)
            grad = grad.reshape(-1, grad.shape[-1])
            if ctx.needs_input_grad[1]:
                given = (F.gelu(x, approximate="tanh") if ctx.gelu else x).reshape(-1, x.shape[-1]).to(to)
                of_weight = onednn.product(grad.T, given).to(weight.dtype)
            if bias is not None and ctx.needs_input_grad[2]:
                of_bias = grad.sum(0).to(bias.dtype)
            if ctx.needs_input_grad[0]:
                of_x = onednn.product(grad, weight.to(to)).view(x.shape).to(x.dtype)
                if ctx.gelu:
                    of_x = torch.ops.aten.gelu_backward(of_x, x, approximate="tanh")
        return of_x, of_weight, of_bias, None
