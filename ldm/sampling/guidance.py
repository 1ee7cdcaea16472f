"""Guidance: each function takes a denoiser and gives a denoiser; samplers never see it."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.types import Cond, Denoise


def pair(denoise: Denoise, x: Tensor, t: Tensor, cond: Cond, uncond: Cond) -> tuple[Tensor, Tensor]:
    """(conditional, unconditional) estimates of x_0 from one call of twice the batch.

    `uncond` may have batch 1; a key that it lacks (sizes, a mask) is taken from `cond`.
    """
    count = x.shape[0]
    both = {}
    for key, value in cond.items():
        other = uncond.get(key, value)
        both[key] = torch.cat([other.to(value).expand(count, *other.shape[1:]), value])
    without, with_ = denoise(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
    return with_, without


def classifier_free(
    denoise: Denoise,
    uncond: Cond,
    scale: float,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
) -> Denoise:
    """Classifier-free guidance, u + scale (c - u) (arXiv 2207.12598; scale 1 is no guidance and costs one batch).

    `uncond` is the empty or the negative prompt. `rescale` in [0, 1] moves the standard deviation of each sample back
    to that of the conditional estimate (arXiv 2305.08891, eqs. 14-16). `interval` = (low, high) times outside of
    which there is no guidance (arXiv 2404.07724).
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must lie in [0, 1], got {rescale}")
    check_interval(interval)
    if scale == 1:
        return denoise

    def guided(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with_, without = pair(denoise, x, t, cond, uncond)
        out = rescaled(without + scale * (with_ - without), with_, rescale)
        return within(interval, t, out, with_)

    return guided


def check_interval(interval: tuple[float, float] | None) -> None:
    """Raise ValueError unless low <= high."""
    if interval is not None and not interval[0] <= interval[1]:
        raise ValueError(f"interval must be (low, high) with low <= high, got {interval}")


def within(interval: tuple[float, float] | None, t: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
    """`inside` for samples whose time lies in the interval; chosen on the device, without waiting for it."""
    if interval is None:
        return inside
    chosen = ((t >= interval[0]) & (t <= interval[1])).view(-1, *[1] * (inside.dim() - 1))
    return torch.where(chosen, inside, outside)


def rescaled(guided: Tensor, reference: Tensor, amount: float) -> Tensor:
    """`guided` with its per-sample standard deviation moved by `amount` towards that of `reference`."""
    if amount == 0:
        return guided
    dims = tuple(range(1, guided.dim()))
    ratio = reference.std(dims, keepdim=True) / guided.std(dims, keepdim=True).clamp(min=1e-8)
    return guided * (amount * ratio + 1 - amount)
