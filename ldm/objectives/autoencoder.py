"""The autoencoder's loss: L1 + KL + perceptual + adversarial (Esser et al. 2021, Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.metrics.features import perceptual_distance
from ldm.models.discriminator import Discriminator
from ldm.models.vae.autoencoder import Autoencoder
from ldm.objectives.base import Objective
from ldm.rng import Rng
from ldm.types import Batch, Metrics

Features = Callable[[Tensor], list[Tensor]]
"""Images (B, 3, H, W) in [-1, 1] -> feature maps (B, C, h, w) of several depths, differentiable."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderLoss:
    """Weights of the terms; the adversarial one starts after `adversarial_start` optimizer steps.

    `adversarial` is relative: that term's gradient at the decoded pixels has this fraction of the norm of the others'.
    """

    l1: float = 1.0
    """Weight of the mean absolute error of pixels."""
    kl: float = 1e-6
    """Weight of the latents' KL divergence from a standard normal."""
    perceptual: float = 1.0
    """Weight of the perceptual term."""
    adversarial: float = 0.1
    adversarial_start: int = 1000

    def __post_init__(self) -> None:
        for name in ("l1", "kl", "perceptual", "adversarial", "adversarial_start"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


def kl_to_standard_normal(moments: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) per sample, summed over (Z, h, w): (B,)."""
    mean, logvar = moments.float().chunk(2, dim=1)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


class AutoencoderObjective(Objective):
    """Generator and discriminator terms in one backward pass, neither of which reaches the other's weights.

    The generator's adversarial term enters through its gradient at the decoded pixels, and the discriminator sees those
    pixels detached: no parameter is detached or swapped, so it is right under every ZeRO stage.
    """

    def __init__(
        self, autoencoder: Autoencoder, discriminator: Discriminator, loss: AutoencoderLoss, features: Features | None
    ) -> None:
        super().__init__(nn.ModuleDict({"autoencoder": autoencoder, "discriminator": discriminator}))
        self.loss = loss
        self._autoencoder = [autoencoder]  # in lists: registered once, under `trained`
        self._discriminator = [discriminator]
        self._features = features
        self._step = 0

    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Loss and its terms; pixels are compared in float32."""
        autoencoder, discriminator = self._autoencoder[0], self._discriminator[0]
        images = batch["image"].to(self.device)
        moments = autoencoder.encode(images)
        mean, logvar = moments.float().chunk(2, dim=1)
        noise = rng.normal("posterior", mean.shape[1:]).to(mean)
        decoded = autoencoder.decode(mean + (0.5 * logvar).exp() * noise).float()
        l1 = (decoded - images).abs().mean()
        kl = kl_to_standard_normal(moments).mean()
        total = self.loss.l1 * l1 + self.loss.kl * kl
        metrics = {"l1": l1, "kl": kl}
        if self._features is not None and self.loss.perceptual > 0:
            metrics["perceptual"] = perceptual_distance(self._features(decoded), self._features(images)).mean()
            total = total + self.loss.perceptual * metrics["perceptual"]
        on = float(self._step >= self.loss.adversarial_start and self.loss.adversarial > 0)
        if on:
            adversarial = -discriminator(decoded).float().mean()
            others = torch.autograd.grad(total, decoded, retain_graph=True)[0]
            slope = torch.autograd.grad(adversarial, decoded)[0]
            metrics["balance"] = balance(others, slope)
            metrics["adversarial"] = adversarial.detach()
            term = adversarial.detach() + (slope * (decoded - decoded.detach())).sum()
            total = total + self.loss.adversarial * metrics["balance"] * term
            critic = hinge(discriminator(images).float(), discriminator(decoded.detach()).float())
            metrics["discriminator"] = critic
            total = total + critic
        else:  # every parameter takes part on every rank
            total = total + 0.0 * sum(p.float().sum() for p in discriminator.parameters())
        return total, {k: v.detach() for k, v in metrics.items()}

    def after_step(self, step: int) -> None:
        """Remember where the run is, for the start of the adversarial term."""
        self._step = step


def balance(others: Tensor, adversarial: Tensor) -> Tensor:
    """Norm of the other terms' gradient over the adversarial one's (Esser et al. 2021, eq. 7).

    Both at the decoded pixels (B, 3, H, W), not at the last layer.
    """
    return (others.norm() / (adversarial.norm() + 1e-8)).clamp(max=1e4)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's hinge loss (Lim & Ye 2017): mean relu(1 - real)/2 + relu(1 + fake)/2."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
