"""Element-wise operations that keep less for the backward pass than autograd would, and compute the rest again.

Legend: B batch, C channels, N all further axes together.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.casts import autocast_dtype


def norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """SiLU(GroupNorm(x)) of x (B, C, ...), computed in the weight's type, given in the type of x.

    Keeps x and the statistics; autograd would keep the normalised x too.
    """
    return _NormSiLU.apply(x, weight, bias, groups, eps)[0]  # type: ignore[index]


def norm_silu_conv(
    x: Tensor, norm: tuple[Tensor, Tensor], groups: int, eps: float, weight: Tensor, bias: Tensor
) -> Tensor:
    """conv(SiLU(GroupNorm(x))) of x (B, C, H, W) for a 3x3 convolution padded by 1, in autocast's type if it is on.

    Keeps x and the statistics; autograd would keep the convolution's input too, which only the gradient of its weights
    needs: where these train it is computed again.
    """
    return _NormSiLUConv.apply(x, *norm, groups, eps, weight, bias, autocast_dtype(x) or x.dtype)[0]  # type: ignore[index]


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
        grad, needed = grads[0], list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled():  # gradients of gradients: leave it to autograd
            inputs = [v for v, n in zip((x, weight, bias), needed, strict=True) if n]
            out = F.silu(F.group_norm(_wide(x, weight), ctx.groups, weight, bias, ctx.eps))
            found = iter(torch.autograd.grad(out, inputs, grad.to(out.dtype), create_graph=True))
            return (*(next(found) if n else None for n in needed), None, None)
        out = _norm(x, weight, bias, ctx.groups, ctx.eps)[0]
        return (*_norm_silu_backward(grad, out, x, weight, mean, rstd, ctx.groups, needed), None, None)


class _NormSiLUConv(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float, weight: Tensor, bias: Tensor, to: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, mean, rstd = _norm(x, scale, shift, groups, eps)
        given = F.silu(out, inplace=True).to(x.dtype)
        return F.conv2d(given.to(to), weight.to(to), bias.to(to), padding=1), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, scale, shift, ctx.groups, ctx.eps, weight, bias, ctx.to = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, scale, shift, weight, bias, *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, weight, bias, mean, rstd = ctx.saved_tensors
        needed, to = ctx.needs_input_grad, ctx.to
        if torch.is_grad_enabled():  # gradients of gradients: leave it to autograd
            places = (0, 1, 2, 5, 6)
            inputs = [v for v, i in zip((x, scale, shift, weight, bias), places, strict=True) if needed[i]]
            given = F.silu(F.group_norm(_wide(x, scale), ctx.groups, scale, shift, ctx.eps)).to(x.dtype)
            out = F.conv2d(given.to(to), weight.to(to), bias.to(to), padding=1)
            found = iter(torch.autograd.grad(out, inputs, grads[0].to(to), create_graph=True))
            return tuple(next(found) if i in places and needed[i] else None for i in range(8))
        out = _norm(x, scale, shift, ctx.groups, ctx.eps)[0]
        grad, asked = grads[0].to(to), [needed[5], needed[6]]
        of_weight = of_bias = None
        if any(asked):  # apart from the input's gradient, so that less is held at once
            given = F.silu(out).to(x.dtype).to(to)
            _, of_weight, of_bias = _convolution_backward(grad, given, weight.to(to), [False, *asked])
            del given
        of_norm: tuple[Tensor | None, ...] = (None, None, None)
        if any(needed[:3]):
            grad = _convolution_backward(grad, x.to(to), weight.to(to), [True, False, False])[0]  # x for its shape
            grad = grad.to(x.dtype).to(out.dtype)
            of_norm = _norm_silu_backward(grad, out, x, scale, mean, rstd, ctx.groups, list(needed[:3]))
        of_weight = None if of_weight is None else of_weight.to(weight.dtype)
        return (*of_norm, None, None, of_weight, None if of_bias is None else of_bias.to(bias.dtype), None)


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
    """Gradients of the input, the weights and the bias of a 3x3 convolution padded by 1."""
    ones = (1, 1)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [len(weight)], ones, ones, ones, False, (0, 0), 1, wanted
    )


def _norm_silu_backward(
    grad: Tensor, out: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, groups: int, needed: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x and of the norm's weight and bias, for out = GroupNorm(x) and the gradient of SiLU(out)."""
    grad = torch.ops.aten.silu_backward(grad.to(out.dtype), out)
    wide = _wide(x, weight)
    layout = torch.contiguous_format if x.device.type == "cpu" or wide.is_contiguous() else torch.channels_last
    found = torch.ops.aten.native_group_norm_backward(
        grad.contiguous(memory_format=layout), wide, mean, rstd, weight, *_sizes(x), groups, needed
    )
    return (found[0].to(x.dtype) if needed[0] else None, *found[1:])


def _norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.native_group_norm(_wide(x, weight), weight, bias, *_sizes(x), groups, eps)


def _wide(x: Tensor, weight: Tensor) -> Tensor:
    """x in the type of the norm's weights; the CPU's norm takes half precision beside float32 weights as it is."""
    mixed = x.device.type == "cpu" and weight.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)
    return x if mixed else x.to(weight.dtype)


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


def gated(both: Tensor) -> Tensor:
    """a * gelu(b) of both halves, as it is computed."""
    value, gate = both.chunk(2, dim=-1)
    return F.gelu(gate).mul_(value)


def gated_backward(grad: Tensor, both: Tensor) -> Tensor:
    """The gradient of both halves."""
    value, gate = both.chunk(2, dim=-1)
    return torch.cat([grad * F.gelu(gate), torch.ops.aten.gelu_backward(grad * value, gate)], dim=-1)


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(both: Tensor) -> Tensor:
        return gated(both)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return gated_backward(grads[0], ctx.saved_tensors[0])
