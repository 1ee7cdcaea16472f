"""Element-wise operations that keep less for the backward pass than autograd would, and compute the rest again.

Legend: B batch, C channels, N all further axes together.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """SiLU(GroupNorm(x)) of x (B, C, ...), computed in the weight's type, given in the type of x.

    Keeps x and the statistics; autograd would keep the normalised x too.
    """
    return _NormSiLU.apply(x, weight, bias, groups, eps)[0]  # type: ignore[index]


def norm_modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift of x (B, N, D) for shift and scale (B or 1, 1, D), all of one type.

    Keeps x and the statistics; autograd would keep the normalised x too.
    """
    return _NormModulated.apply(x, shift, scale, eps)[0]  # type: ignore[index]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm(x) of the last axis, with statistics in float32 in half precision, in the type of x; keeps x alone."""
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[return-value]


def geglu(both: Tensor) -> Tensor:
    """a * gelu(b) of both halves (..., 2D) -> (..., D); keeps `both`, autograd would keep gelu(b) too."""
    return _GEGLU.apply(both)  # type: ignore[return-value]


class _NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        out, mean, rstd = _norm(x, weight, bias, groups, eps)
        return F.silu(out, inplace=True).to(x.dtype), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, bias, ctx.groups, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weight, bias, *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        grad, needed = grads[0].to(weight.dtype), list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled():  # gradients of gradients: leave it to autograd
            inputs = [v for v, n in zip((x, weight, bias), needed, strict=True) if n]
            out = F.silu(F.group_norm(x.to(weight.dtype), ctx.groups, weight, bias, ctx.eps))
            found = iter(torch.autograd.grad(out, inputs, grad, create_graph=True))
            return (*(next(found) if n else None for n in needed), None, None)
        out = _norm(x, weight, bias, ctx.groups, ctx.eps)[0]
        grad = torch.ops.aten.silu_backward(grad, out)
        wide = x.to(weight.dtype)
        layout = torch.contiguous_format if x.device.type == "cpu" or wide.is_contiguous() else torch.channels_last
        found = torch.ops.aten.native_group_norm_backward(
            grad.contiguous(memory_format=layout), wide, mean, rstd, weight, *_sizes(x), ctx.groups, needed
        )
        return (found[0].to(x.dtype) if needed[0] else None, *found[1:], None, None)


def _norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.native_group_norm(x.to(weight.dtype), weight, bias, *_sizes(x), groups, eps)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """(B, C, N)."""
    return x.shape[0], x.shape[1], x[0, 0].numel() if x.numel() else 0


class _NormModulated(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        # A GPU's autocast norms in float32, of which each layer that follows would keep a copy of its own.
        return torch.addcmul(shift, normed, 1 + scale).to(x.dtype), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, shift, scale, ctx.eps = inputs
        ctx.rows = shift.shape[0]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, scale, *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, mean, rstd = ctx.saved_tensors
        grad, width = grads[0], x.shape[-1:]
        of_x = of_shift = of_scale = None
        if ctx.needs_input_grad[1]:
            of_shift = grad.sum_to_size(ctx.rows, 1, *width)
        if ctx.needs_input_grad[2]:
            of_scale = (grad * F.layer_norm(x, width, eps=ctx.eps)).sum_to_size(scale.shape)
        if ctx.needs_input_grad[0]:
            grad = grad * (1 + scale)
            if torch.is_grad_enabled():  # gradients of gradients: leave it to autograd
                of_x = torch.autograd.grad(F.layer_norm(x, width, eps=ctx.eps), x, grad, create_graph=True)[0]
            else:
                needed = [True, False, False]
                of_x = torch.ops.aten.native_layer_norm_backward(grad, x, width, mean, rstd, None, None, needed)[0]
        return of_x, of_shift, of_scale, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.eps = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to = torch.promote_types(x.dtype, torch.float32)
        wide, grad = x.to(to), grads[0].to(to)
        rstd = (wide.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        normed = wide * rstd
        of_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad = grad * weight.to(to)
        of_x = rstd * (grad - normed * (grad * normed).mean(-1, keepdim=True)) if ctx.needs_input_grad[0] else None
        return None if of_x is None else of_x.to(x.dtype), of_weight, None


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(both: Tensor) -> Tensor:
        value, gate = both.chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        value, gate = ctx.saved_tensors[0].chunk(2, dim=-1)
        grad = grads[0]
        return torch.cat([grad * F.gelu(gate), torch.ops.aten.gelu_backward(grad * value, gate)], dim=-1)
