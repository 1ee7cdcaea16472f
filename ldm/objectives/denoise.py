"""The denoising loss with text conditioning and classifier-free-guidance dropout (DDPM; Ho & Salimans 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.diffusion.process import Process
from ldm.models.latents import LatentCodec
from ldm.objectives.base import Objective, by_noise
from ldm.objectives.inputs import EncodeText, LatentFeed
from ldm.rng import Rng
from ldm.types import Batch, Cond, Metrics


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
        self._feed = LatentFeed(codec, encode_text, options.drop)

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
        return loss, by_noise(losses.detach(), t / self.process.schedule.last)

    def latents(self, batch: Batch, rng: Rng) -> Tensor:
        """Scaled latents (B, Z, h, w), a draw from the posterior."""
        return self._feed.latents(batch, rng, self.device)

    def cond(self, batch: Batch, rng: Rng) -> Cond:
        """Text states, with the dropped ones replaced by those of the empty prompt."""
        return self._feed.cond(batch, rng, self.device)
