"""Guidance: each function takes a denoiser and gives a denoiser; samplers never see it.

Legend: c, u, n the estimates of x_0 under the prompt, without one, under a negative prompt. Estimates of x_0 combine as
estimates of the noise do, since at fixed x the one is an affine function of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ldm.diffusion.prediction import broadcast
from ldm.diffusion.process import LearnedDenoise
from ldm.diffusion.schedule import Schedule
from ldm.sampling.texts import is_text, padded
from ldm.types import Cond, Denoise
from ldm.words import near

GUIDES = ("cfg", "projected", "perpendicular")

Scale = TypeVar("Scale", float, Tensor)
Push = Callable[[Tensor, Tensor, Cond, Tensor], Tensor]
"""(x, t, cond, the prompt's own estimate of x_0) -> what is added to the guided estimate."""


def check_guide(kind: str, rescale: float, interval: tuple[float, float] | None) -> None:
    """Raise ValueError for an unknown kind, a rescale that it has not, or an interval that is not two shares of T."""
    if kind not in GUIDES:
        raise ValueError(f"guide must be one of {list(GUIDES)}, got {kind!r}{near(kind, GUIDES)}")
    if rescale and kind != "cfg":
        raise ValueError(f"rescale: guide {kind!r} has none, got {rescale}")
    if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"interval must be two shares of T, 0 <= low <= high <= 1, got {interval}")


def times_of(shares: tuple[float, float] | None, last: float) -> tuple[float, float] | None:
    """An interval of times from one of shares of the last time."""
    return None if shares is None else (shares[0] * last, shares[1] * last)


def together(denoise: Denoise, x: Tensor, t: Tensor, conds: list[Cond]) -> list[Tensor]:
    """The estimate under each conditioning from one call of len(conds) times the batch.

    The first is the whole one: the others may have batch 1, and take from it the keys that they lack (sizes, a
    picture). Where only texts differ, "copies" (len(conds), 0) says so to networks that compute equal rows once. Texts
    of different lengths are padded under their masks; without masks they raise ValueError.
    """
    conds = padded(conds)
    whole, count = conds[0], x.shape[0]
    merged = {}
    # A plain "pooled" may enter a U-Net's time embedding, which "copies" would take for the same in every part.
    if all(is_text(key) and key != "pooled" for cond in conds[1:] for key in cond):
        merged["copies"] = x.new_empty(len(conds), 0)
    for key, value in whole.items():
        rows = [cond.get(key, value).to(value) for cond in conds]
        for row in rows:
            if row.shape[0] not in (1, count):
                raise ValueError(f"cond {key!r} has batch {row.shape[0]}, expected 1 or {count}")
        merged[key] = torch.cat([row.expand(count, *row.shape[1:]) for row in reversed(rows)])
    n = len(conds)
    return list(reversed(denoise(torch.cat([x] * n), torch.cat([t] * n), merged).chunk(n)))


def classifier_free(
    denoise: Denoise,
    uncond: Cond,
    scale: float,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    push: Push | None = None,
) -> Denoise:
    """Classifier-free guidance, u + scale (c - u) (arXiv 2207.12598; scale 1 is no guidance and costs one batch).

    `uncond` is the empty or the negative prompt; its rows come first in the doubled batch. `rescale` in [0, 1] moves
    the standard deviation of each sample back to that of the conditional estimate (arXiv 2305.08891, eqs. 14-16).
    `interval` = (low, high) times outside of which there is no guidance (arXiv 2404.07724). A learned variance stays
    that of the conditional estimate. `push` adds to the result, such as `skip_layers`.
    """
    check_fraction("rescale", rescale)
    check_interval(interval)
    if scale == 1:
        return denoise if push is None else pushed(denoise, push)

    def combined(x: Tensor, t: Tensor, cond: Cond, c: Tensor, u: Tensor) -> Tensor:
        out = within(interval, t, rescaled(u + scale * (c - u), c, rescale), c)
        return out if push is None else out + push(x, t, cond, c)

    def guided(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return combined(x, t, cond, *together(denoise, x, t, [cond, uncond]))

    if not isinstance(denoise, LearnedDenoise):
        return guided
    learned = denoise

    def both(x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []

        def estimate(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            x0, fraction = learned.both(x, t, cond)
            found.append(fraction.chunk(2)[1])  # the prompt's rows come last
            return x0

        return combined(x, t, cond, *together(estimate, x, t, [cond, uncond])), found[0]

    return LearnedDenoise(both)


def of_text_and_picture(
    denoise: Denoise,
    uncond: Cond,
    scale: float,
    picture_scale: float,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
) -> Denoise:
    """Guidance by a text and a picture, i.e. cond "concat": n + s_p (p - n) + s_t (c - p) (arXiv 2211.09800, eq. 3).

    p is the estimate under the picture and the empty or negative prompt `uncond`, n that under `uncond` and zeros for
    the picture. One call of three times the batch.
    """
    check_fraction("rescale", rescale)
    check_interval(interval)
    if scale == picture_scale == 1:
        return denoise

    def guided(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if "concat" not in cond:
            raise ValueError("guidance by a picture: the network is told none")
        blank = {"concat": torch.zeros_like(cond["concat"][:1])}
        c, p, n = together(denoise, x, t, [cond, uncond, uncond | blank])
        out = n + picture_scale * (p - n) + scale * (c - p)
        return within(interval, t, rescaled(out, c, rescale), c)

    return guided


def told_guidance(denoise: Denoise, scale: float, *, is_scale: bool = False) -> Denoise:
    """For networks distilled with guidance inside (arXiv 2210.03142): one call, told what `told_scale` makes of it."""

    def guided(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        w = torch.full((len(x),), told_scale(scale, is_scale), dtype=torch.float32, device=x.device)
        return denoise(x, t, {**cond, "guidance": w})

    return guided


def told_scale(scale: Scale, is_scale: bool) -> Scale:
    """What a network is told as cond "guidance": the scale itself (FLUX.1), or w = scale - 1 (LCM and its kind).

    Which of them is the network's `guidance_is_scale`.
    """
    return scale if is_scale else scale - 1


def skip_layers(without: Denoise, scale: float, interval: tuple[float, float] | None) -> Push:
    """Skip-layer guidance: `scale` (c - s), with s the prompt's estimate of the network `without` some blocks.

    To be given to a guidance as its `push`, which has c already; so a step inside of `interval` (of times, see
    `interval_of_steps`; None: never) costs one more single batch, any other step none. Published for SD3.5 medium.
    """

    def push(x: Tensor, t: Tensor, cond: Cond, c: Tensor) -> Tensor:
        # Whether to call the network cannot be left to the device: one wait is much shorter than a call.
        if interval is None or not bool(((t >= interval[0]) & (t <= interval[1])).any()):
            return torch.zeros_like(c)
        return within(interval, t, scale * (c - without(x, t, cond)), torch.zeros_like(c))

    return push


def pushed(denoise: Denoise, push: Push) -> Denoise:
    """A push without any other guidance."""

    def guided(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        c = denoise(x, t, cond)
        return c + push(x, t, cond, c)

    return guided


def interval_of_steps(times: Sequence[float], shares: tuple[float, float]) -> tuple[float, float] | None:
    """The times of the steps i with shares[0] N < i < shares[1] N, of the N that a sampler visits; None of no step.

    The borders lie half way to the neighbouring steps, so that rounding moves none.
    """
    count = len(times)
    inside = [i for i in range(count) if shares[0] * count < i < shares[1] * count]
    if not inside:
        return None
    first, last = inside[0], inside[-1]
    high = times[first] if first == 0 else (times[first - 1] + times[first]) / 2
    low = times[last] / 2 if last == count - 1 else (times[last] + times[last + 1]) / 2
    return low, high


def projected(
    denoise: Denoise,
    uncond: Cond,
    scale: float,
    parallel: float = 0.0,
    radius: float | None = None,
    interval: tuple[float, float] | None = None,
    push: Push | None = None,
) -> Denoise:
    """Adaptive projected guidance (arXiv 2410.02416, alg. 1, without its momentum, so that it keeps no state).

    c - u is cut to norm `radius` and split along c: the orthogonal part is kept, the parallel one, which saturates,
    times `parallel` (1 and no radius: classifier-free guidance).
    """
    check_interval(interval)
    if radius is not None and not radius > 0:
        raise ValueError(f"radius must be above 0, got {radius}")

    def guided(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        c, u = together(denoise, x, t, [cond, uncond])
        gap = c - u
        if radius is not None:
            gap = gap * (radius / _norm(gap).clamp(min=1e-12)).clamp(max=1.0)
        along = project(gap, c)
        out = within(interval, t, c + (scale - 1) * (gap - along + parallel * along), c)
        return out if push is None else out + push(x, t, cond, c)

    return guided


def perpendicular(
    denoise: Denoise,
    uncond: Cond,
    negative: Cond,
    scale: float,
    negative_scale: float = 1.0,
    interval: tuple[float, float] | None = None,
    push: Push | None = None,
) -> Denoise:
    """Perp-Neg: only what the negative prompt has beside the prompt is pushed away (arXiv 2304.04968, eq. 8).

    One call of three times the batch.
    """
    check_interval(interval)

    def guided(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        c, u, n = together(denoise, x, t, [cond, uncond, negative])
        toward, away = c - u, n - u
        away = away - project(away, toward)
        out = within(interval, t, u + scale * (toward - negative_scale * away), c)
        return out if push is None else out + push(x, t, cond, c)

    return guided


def similarity(
    denoise: Denoise,
    score: Callable[[Tensor], Tensor],
    scale: float,
    *,
    schedule: Schedule,
    decode: Callable[[Tensor], Tensor] | None = None,
    through_network: bool = False,
    interval: tuple[float, float] | None = None,
) -> Denoise:
    """CLIP guidance: x_0 + scale Cov[x_0 | x] grad score (classifier guidance, arXiv 2105.05233, eq. 14, on x_0).

    `score(pixels) -> (B,)` is a log-probability or a similarity with an image-text model, `decode(x_0) -> pixels`
    the autoencoder's decoder (None: x_0 are pixels). The covariance is exact through the network's gradient, or,
    without it, that of white data, sigma^2 / (alpha^2 + sigma^2), at a fraction of the memory. Wrap the guided
    denoiser, not the other way round. The gradient exists under `torch.no_grad`, not under `torch.inference_mode`.
    """
    check_interval(interval)
    if scale == 0:
        return denoise

    def gradient(x: Tensor, estimate: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            x0 = estimate(leaf)
            value = score(x0 if decode is None else decode(x0))
            if value.shape != x.shape[:1]:
                raise ValueError(f"score must give one value per sample, ({x.shape[0]},), got {tuple(value.shape)}")
            return x0.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    def guided(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        alpha, sigma = (broadcast(v, x) for v in schedule.alpha_sigma(t))
        if through_network:
            x0, slope = gradient(x, lambda leaf: denoise(leaf, t, cond))
            size = sigma**2 / alpha.clamp(min=1e-8) * (alpha > 0)
        else:
            x0, slope = gradient(denoise(x, t, cond), lambda leaf: leaf)
            size = sigma**2 / (alpha**2 + sigma**2)
        return within(interval, t, x0 + scale * (size * slope).to(x0.dtype), x0)

    return guided


def project(v: Tensor, onto: Tensor) -> Tensor:
    """The part of each sample of v along that of `onto`, in float64 (samples may be large)."""
    dims = tuple(range(1, v.dim()))
    wide, base = v.double(), onto.double()
    share = (wide * base).sum(dims, keepdim=True) / (base * base).sum(dims, keepdim=True).clamp(min=1e-24)
    return (share * base).to(v.dtype)


def _norm(v: Tensor) -> Tensor:
    return v.pow(2).sum(tuple(range(1, v.dim())), keepdim=True).sqrt()


def rescaled(guided: Tensor, reference: Tensor, amount: float) -> Tensor:
    """`guided` with its per-sample standard deviation moved by `amount` towards that of `reference`."""
    if amount == 0:
        return guided
    dims = tuple(range(1, guided.dim()))
    ratio = reference.std(dims, keepdim=True) / guided.std(dims, keepdim=True).clamp(min=1e-8)
    return guided * (amount * ratio + 1 - amount)


def within(interval: tuple[float, float] | None, t: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
    """`inside` for samples whose time lies in the interval; chosen on the device, without waiting for it."""
    if interval is None:
        return inside
    chosen = ((t >= interval[0]) & (t <= interval[1])).view(-1, *[1] * (inside.dim() - 1))
    return torch.where(chosen, inside, outside)


def check_interval(interval: tuple[float, float] | None) -> None:
    """Raise ValueError unless low <= high."""
    if interval is not None and not interval[0] <= interval[1]:
        raise ValueError(f"interval must be (low, high) with low <= high, got {interval}")


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError unless 0 <= value <= 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
