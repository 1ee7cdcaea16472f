"""One attention function; its backend is chosen once per device type and stated in the log.

Legend: B batch, T query tokens, S key tokens, H heads, D width of a head.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.wide import emulates

log = logging.getLogger(__name__)
Control = Callable[[Tensor], Tensor]
"""Attention weights (B, H, T, S) -> weights to use instead."""
BACKENDS = ("auto", "xformers", "sdpa", "reference")
ALIGNED = 8
_chosen: dict[str, str] = {}
_xformers: Any = None
_slice: int | None = None


def choose(device: str | torch.device, backend: str = "auto") -> str:
    """Fix the backend of one device type and return its name; "auto" prefers xformers where it works, then SDPA.

    Raises ValueError for an unknown name, or for "xformers" where it cannot run.
    """
    kind = torch.device(device).type
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is not one of {list(BACKENDS)}")
    reason = _why_not_xformers(kind) if backend in ("auto", "xformers") else ""
    if backend == "xformers" and reason:
        raise ValueError(f"attention backend 'xformers': {reason}; use 'sdpa' or 'auto'")
    name = backend if backend != "auto" else ("sdpa" if reason else "xformers")
    log.info("attention on %s: %s%s", kind, name, f" ({reason})" if reason else "")
    _chosen[kind] = name
    return name


@contextmanager
def using(device: str | torch.device, backend: str) -> Iterator[None]:
    """Choose a backend inside a `with` block, and return to the one before it."""
    kind = torch.device(device).type
    before = _chosen.get(kind)
    choose(device, backend)
    try:
        yield
    finally:
        if before is None:
            del _chosen[kind]
        else:
            _chosen[kind] = before


@contextmanager
def sliced(queries: int | None) -> Iterator[None]:
    """Inside, at most so many queries (pixels) at a time attend: less memory where weights are formed; None is all."""
    global _slice
    if queries is not None and queries < 1:
        raise ValueError(f"attention slices must have at least 1 query, got {queries}")
    before, _slice = _slice, queries
    try:
        yield
    finally:
        _slice = before


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q (B, T, H, D), k and v (B, S, H, D), mask added or bool.

    The mask is (B or 1, H or 1, T or 1, S). Returns (B, T, H, D). A boolean mask is True where a key is seen. Compiled
    before any choice it is SDPA.
    """
    if _slice is not None and q.shape[1] > _slice:
        parts = q.split(_slice, dim=1)
        masks = [mask] * len(parts) if mask is None or mask.shape[2] == 1 else mask.split(_slice, dim=2)
        return torch.cat([_attention(part, k, v, m) for part, m in zip(parts, masks, strict=True)], dim=1)
    return _attention(q, k, v, mask)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    backend = _chosen.get(q.device.type) or ("sdpa" if torch.compiler.is_compiling() else choose(q.device))
    if backend == "xformers":
        bias = None if mask is None else _aligned(_bias(mask, q)).expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        return _xformers.memory_efficient_attention(q, k, v, attn_bias=bias)
    if backend == "sdpa" and not torch.compiler.is_compiling() and q.device.type == "cpu" and emulates(q.dtype):
        return _in_float32(q, k, v, mask)
    if backend == "sdpa" and mask is None and _slow(q, k):
        return _products(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    return (probabilities(q, k, mask) @ v).transpose(1, 2)


def _in_float32(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """For CPUs that emulate half precision; with gradients only what was given is kept, and widened again."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Wide.apply(q, k, v, mask)  # type: ignore[return-value]
    return _widened(q, k, v, mask)


def _widened(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    dtype, mask = q.dtype, mask if mask is None or mask.dtype == torch.bool else mask.float()
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).to(dtype)


class _Wide(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return _widened(q, k, v, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        again, needed = torch.is_grad_enabled(), ctx.needs_input_grad
        leaves: list[Any] = list(ctx.saved_tensors)
        with torch.enable_grad():
            if not again:
                leaves = [x if x is None else x.detach().requires_grad_(n) for x, n in zip(leaves, needed, strict=True)]
            out = _widened(leaves[0], leaves[1], leaves[2], leaves[3])
        wanted = [x for x, n in zip(leaves, needed, strict=True) if n]
        found = iter(torch.autograd.grad(out, wanted, grads[0], create_graph=again))
        return tuple(next(found) if n else None for n in needed)


def _slow(q: Tensor, k: Tensor) -> bool:
    """On the CPU torch's fused kernel in half precision loses to plain products up to some hundred tokens."""
    if torch.compiler.is_compiling() or q.device.type != "cpu" or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    backward = torch.is_grad_enabled() and q.requires_grad
    return q.shape[1] * k.shape[1] <= 1 << (16 if backward else 18)


def _products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by batched matrix products; softmax sums in float32 whatever the type."""
    b, t, h, d = q.shape
    q, k, v = (x.transpose(1, 2).reshape(b * h, -1, d) for x in (q, k, v))
    zero = torch.empty((), dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(zero, q, k.transpose(1, 2), beta=0, alpha=1 / math.sqrt(d))
    return torch.bmm(scores.softmax(dim=-1), v).view(b, h, t, d).transpose(1, 2)


def probabilities(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention weights (B, H, T, S) of q (B, H, T, D) and k (B, H, S, D); softmax in float32 at least."""
    scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + _bias(mask, q)
    wide = scores.dtype if scores.dtype == torch.float64 else torch.float32
    return scores.softmax(dim=-1, dtype=wide).to(q.dtype)


def controlled(q: Tensor, k: Tensor, v: Tensor, control: Control, mask: Tensor | None = None) -> Tensor:
    """`attention` whose weights go through `control`, for editing and for pictures of them."""
    weights = control(probabilities(q.transpose(1, 2), k.transpose(1, 2), mask))
    return (weights @ v.transpose(1, 2)).transpose(1, 2)


def _bias(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, -math.inf)


def _aligned(bias: Tensor) -> Tensor:
    """The same numbers in rows of a multiple of 8, which xformers' kernels want (PixArt's text has 300 tokens)."""
    keys = bias.shape[-1]
    return F.pad(bias, (0, -keys % ALIGNED))[..., :keys] if keys % ALIGNED else bias.contiguous()


def _why_not_xformers(kind: str) -> str:
    """Empty if xformers runs on this device type, else the reason; its wheel may not match the installed torch."""
    global _xformers
    if kind != "cuda":
        return f"xformers has no {kind} operator"
    try:
        _xformers = importlib.import_module("xformers.ops")
        probe = torch.zeros(1, 8, 1, 32, device="cuda", dtype=torch.float16)
        _xformers.memory_efficient_attention(probe, probe, probe)
    except Exception as error:  # a wheel built for another torch fails in ways of its own
        return f"xformers does not work here: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}"
    return ""
