"""The denoising loss with text conditioning and classifier-free-guidance dropout (DDPM; Ho & Salimans 2022)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.diffusion.process import Process
from ldm.models.latents import LatentCodec
from ldm.objectives.base import Objective
from ldm.rng import Rng
from ldm.types import Batch, Cond, Metrics

EncodeText = Callable[[Sequence[str]], Cond]
"""Prompts -> Cond with batch axis B."""


@dataclass(frozen=True, kw_only=True)
class DenoiseOptions:
    """`drop`: share of samples whose caption becomes the empty prompt, which guidance uses as its other half."""

    drop: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop must be in [0, 1], got {self.drop}")


class DenoiseObjective(Objective):
    """Weighted error of the network's answer on noised latents.

    The batch is cached moments and text, or pixels and captions. VAE and text towers are frozen and stay
    outside `trained`.
    """

    def __init__(
        self, unet: nn.Module, process: Process, codec: LatentCodec, encode_text: EncodeText, options: DenoiseOptions
    ) -> None:
        super().__init__(unet)
        self.process, self.options = process, options
        self._codec, self._encode_text = codec, encode_text
        with torch.no_grad():
            self._empty = {k: v.float() for k, v in encode_text([""]).items()}

    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Mean over the micro-batch of weight x error; randomness belongs to each sample's global position."""
        latents = self.latents(batch, rng)
        cond = self.cond(batch, rng)
        t = self.process.times(rng.uniform("time")).to(latents.device)
        noise = rng.normal("noise", latents.shape[1:]).to(latents)
        noised = self.process.add_noise(latents, noise, t)
        if torch.is_autocast_enabled(noised.device.type):  # faster in half precision, slower in float32 (docs/log.md)
            noised = noised.contiguous(memory_format=torch.channels_last)
        out = self.trained(noised, t, cond)
        losses = self.process.loss(out, latents, noise, t)
        loss = (losses * batch["weight"].to(losses)).mean()
        return loss, _by_noise(losses.detach(), t / self.process.schedule.last)

    @torch.no_grad()
    def latents(self, batch: Batch, rng: Rng) -> Tensor:
        """Scaled latents (B, Z, h, w), a draw from the posterior."""
        if "moments" in batch:
            moments = batch["moments"].to(self.device)
        else:
            moments = self._codec.moments(batch["image"].to(self.device)).float()
        noise = rng.normal("posterior", (moments.shape[1] // 2, *moments.shape[2:]))
        return self._codec.sample(moments, noise.to(moments))

    @torch.no_grad()
    def cond(self, batch: Batch, rng: Rng) -> Cond:
        """Text states, with the dropped ones replaced by those of the empty prompt."""
        if "text" in batch:
            cond = {k: batch[k].to(self.device) for k in ("text", "pooled") if k in batch}
        else:
            cond = {k: v.float() for k, v in self._encode_text(batch["caption"]).items()}
        dropped = (rng.uniform("drop") < self.options.drop).to(self.device)
        out = {}
        for name, value in cond.items():
            mask = dropped.view(-1, *[1] * (value.ndim - 1))
            out[name] = torch.where(mask, self._empty[name].to(value), value)
        return out


def _by_noise(losses: Tensor, level: Tensor) -> Metrics:
    """The mean loss in thirds of the time range; a third without samples repeats the overall mean."""
    metrics = {}
    for i, name in enumerate(("low", "middle", "high")):
        inside = ((level * 3).clamp(max=2.999).long() == i).float()
        count = inside.sum()
        mean = (losses * inside).sum() / count.clamp(min=1)
        metrics[f"loss_{name}_noise"] = torch.where(count > 0, mean, losses.mean())
    return metrics
