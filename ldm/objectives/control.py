"""Denoising under a condition picture, and how much the answer follows it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm import dist
from ldm.models.unet.controlnet import CONDITION
from ldm.objectives.around import AroundDenoise
from ldm.objectives.denoise import DenoiseObjective
from ldm.rng import Rng
from ldm.types import Batch, Metrics

SENSITIVITY = "control_sensitivity"
MOMENTS = f"{CONDITION}.moments"
"""The condition of a batch as its posterior's moments (B, 2 Z, h, w), in the place of its pixels."""


class ControlObjective(AroundDenoise):
    """A denoising loss, and every `every` steps the control sensitivity of the same samples (0: never).

    That is the loss with the right condition minus the loss with another sample's, at the same noise and times, without
    gradients: 0 while the condition is ignored, and the further below 0 the more the answer follows it. The other
    sample is the next in the micro-batch, of the next rank where a micro-batch is one sample, or else the last one
    before; the first step of a process with that has no figure.
    """

    def __init__(self, denoise: DenoiseObjective, every: int, key: str = CONDITION, name: str = SENSITIVITY) -> None:
        """`key` of the batch is the condition, `name` is what the figure is logged as."""
        super().__init__(denoise)
        self._every, self._step = every, 0
        self._key, self._name = key, name
        self._before: Tensor | None = None

    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        if self._key not in batch:
            raise ValueError(f"the batch has no {self._key!r}; data.pairs makes or reads one")
        told: Metrics = {}
        if self._due and torch.is_grad_enabled():
            # First: what the backward pass needs of the loss would lie beside it.
            other = self._others(batch[self._key])
            told = {} if other is None else {self._name: self._gap(batch, other, rng)}
        loss, metrics = self.denoise(self.prepared(batch, rng), rng)
        if self._every and len(rng) == 1 and dist.world_size() == 1:
            self._before = batch[self._key]
        return loss, metrics | told

    def prepared(self, batch: Batch, rng: Rng) -> Batch:
        """What the denoising loss is given."""
        return batch

    @torch.no_grad()
    def _gap(self, batch: Batch, other: Tensor, rng: Rng) -> Tensor:
        each = [self.prepared({**batch, self._key: shown}, rng) for shown in (batch[self._key], other)]
        right, wrong = (self.denoise(one, rng)[0] for one in each)
        torch.clear_autocast_cache()  # its casts of weights have no gradient, and the loss would be given them
        return right - wrong

    def _others(self, own: Tensor) -> Tensor | None:
        """Each sample's condition is another sample's; None where there is none."""
        if len(own) > 1:
            return own.roll(1, 0)
        if dist.world_size() == 1:
            return self._before
        every = dist.gather(own.to(dist.device()))
        return every[(dist.rank() + 1) % dist.world_size()][None].to(own)

    @property
    def _due(self) -> bool:
        return self._every > 0 and (self._step == 0 or (self._step + 1) % self._every == 0)

    def after_step(self, step: int) -> None:
        self._step = step
        super().after_step(step)


class LatentControlObjective(ControlObjective):
    """`ControlObjective` of a ControlNet that is shown latents (SD3's): of the batch's pixels, or of cached moments."""

    def __init__(self, denoise: DenoiseObjective, every: int, shown: Callable[[Tensor], Tensor]) -> None:
        """`shown`: pixels (B, 3, H, W) in [0, 1] or moments (B, 2 Z, h, w) -> what the network takes."""
        super().__init__(denoise, every)
        self._shown = shown

    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        if MOMENTS in batch:
            batch = {key: value for key, value in batch.items() if key != MOMENTS} | {CONDITION: batch[MOMENTS]}
        return super().forward(batch, rng)

    @torch.no_grad()
    def prepared(self, batch: Batch, rng: Rng) -> Batch:
        return {**batch, CONDITION: self._shown(batch[CONDITION].to(self.device, non_blocking=True).float())}
