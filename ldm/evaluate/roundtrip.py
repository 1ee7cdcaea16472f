"""DDIM inversion of real pictures and back: what it loses beyond the autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.evaluate.measure import settled, unguided
from ldm.metrics.reconstruction import psnr
from ldm.pipeline import Settings, TextToImage
from ldm.sampling import sample
from ldm.sampling.editing import invert


@torch.no_grad()
def round_trip(
    pipeline: TextToImage,
    images: Tensor,
    captions: Sequence[str],
    *,
    steps: int = 250,
    refine: int = 0,
    spacing: str = "trailing",
    batch: int = 16,
) -> dict[str, Any]:
    """PSNR of pictures (N, 3, H, W) after inversion and deterministic DDIM without guidance, beside the autoencoder's.

    Both against the pictures themselves; `lost` is the difference, picture by picture, in dB. Raises ValueError for a
    batch below 1, and what `invert` raises.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    pipeline = settled(pipeline, images, steps)
    schedule = pipeline.process.schedule
    denoise = pipeline.denoiser(Settings(guidance=1.0))
    before: list[Tensor] = []
    after: list[Tensor] = []
    errors: list[Tensor] = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        cond = unguided(pipeline, list(captions[start : start + batch]))
        x0 = pipeline.codec.encode(part.to(pipeline.device)).float()
        how: dict[str, Any] = {"schedule": schedule, "steps": steps, "spacing": spacing}
        x = invert(denoise, x0, cond, refine=refine, **how)
        back = sample("ddim", denoise, x, cond, noise=_none, eta=0.0, **how)
        for found, latents in ((before, x0), (after, back)):
            found.append(psnr(pipeline.codec.decode(latents).clamp(-1, 1).float().cpu(), part))
        errors.append((back - x0).square().flatten(1).mean(1).double().cpu())
    vae, trip = torch.cat(before), torch.cat(after)
    lost = vae - trip
    return {
        "pictures": len(images),
        "psnr_autoencoder": float(vae.mean()),
        "psnr_round_trip": float(trip.mean()),
        "lost": {"mean": float(lost.mean()), "worst": float(lost.max())},
        "latent_rmse": float(torch.cat(errors).mean().sqrt()),
    }


def _none(step: int) -> Tensor:
    raise AssertionError(f"deterministic DDIM draws no noise (step {step})")
