"""The error on held-out pictures in one currency for every process and prediction: fixed noise levels, fixed noise.

Losses of different predictions, weightings and schedules do not compare. Every network gives an estimate of x_0,
though, and at equal SNR all see the same picture of it. Legend: u = sigma / (alpha + sigma), the noise level of the
straight path x_u = (1 - u) x_0 + u noise, which every x_t is but for its scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.process import Process
from ldm.evaluate import measure
from ldm.pipeline import Settings, TextToImage
from ldm.rng import Rng
from ldm.types import Cond, Denoise

LEVELS = tuple(i / 9 for i in range(1, 9))
"""Eight noise levels u, evenly spaced inside (0, 1), which schedules reach that do not end at zero SNR, too."""


def time_of(process: Process, level: float) -> float:
    """The process's (fractional) time of a noise level u. Raises ValueError for one that its schedule never has."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level:g}")
    t = process.schedule.time(math.log((1 - level) / level))
    alpha, sigma = process.schedule.at(t)
    if abs(sigma / (alpha + sigma) - level) > 1e-6:
        raise ValueError(
            f"level {level:g}: the schedule's noise does not reach it; it ends at {sigma / (alpha + sigma):g}"
        )
    return t


def velocity_error(process: Process, denoise: Denoise, x0: Tensor, noise: Tensor, cond: Cond, level: float) -> Tensor:
    """Mean squared error (B,) of the straight path's velocity, noise - x_0, that the estimate of x_0 implies.

    It is the error of x_0 over u squared. x0 and noise are (B, C, H, W); computed where and as `denoise` does.
    """
    t = time_of(process, level)
    alpha, sigma = process.schedule.at(t)
    x = alpha * x0 + sigma * noise
    estimate = denoise(x, torch.full((len(x0),), t, device=x0.device), cond)
    return (estimate - x0).double().square().flatten(1).mean(1) / level**2


@torch.no_grad()
def velocity_errors(
    pipeline: TextToImage,
    images: Tensor,
    captions: Sequence[str],
    *,
    levels: Sequence[float] = LEVELS,
    batch: int = 32,
    seed: int = 0,
) -> Tensor:
    """`velocity_error` (N, levels), float64, of pictures (N, 3, H, W) in [-1, 1] under their captions, unguided.

    A picture's noise belongs to (seed, its place, the level): all models see the same. Latents are the posterior's
    mean, so figures compare for models of one autoencoder.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    pipeline = measure.settled(pipeline, images, 50)
    denoise = pipeline.denoiser(Settings(guidance=1.0))
    rows = []
    for start in range(0, len(images), batch):
        places = tuple(range(start, min(start + batch, len(images))))
        x0 = pipeline.codec.encode(images[start : start + batch].to(pipeline.device)).float()
        cond = measure.unguided(pipeline, [captions[i] for i in places])
        found = []
        for i, level in enumerate(levels):
            noise = Rng(seed, places).normal(f"level {i}", x0.shape[1:]).to(x0)
            found.append(velocity_error(pipeline.process, denoise, x0, noise, cond, level).cpu())
        rows.append(torch.stack(found, 1))
    return torch.cat(rows)
