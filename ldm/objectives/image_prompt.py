"""Denoising with a picture as a prompt, left out for a share of the samples as the words are."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.models.text.vision import ImageEncoder
from ldm.models.unet.image_prompt import STATES
from ldm.objectives.align import FEATURES
from ldm.objectives.control import ControlObjective
from ldm.objectives.denoise import DenoiseObjective
from ldm.rng import Rng
from ldm.types import Batch, Metrics

REFERENCE = "reference"
"""The pair of a batch that is the prompt (B, 3, H, W) in [0, 1]; without it the picture is its own prompt."""


class ImagePromptObjective(ControlObjective):
    """A denoising loss of samples whose picture, or its reference, is a prompt.

    States of the image encoder come from the batch (a cache's), or are made of the reference or the picture. With the
    share `drop` they are those of no picture, for `both` together with the caption, which the denoising loss drops.
    What is logged as `image_sensitivity` is `ControlObjective`'s figure.
    """

    def __init__(
        self,
        denoise: DenoiseObjective,
        encoder: ImageEncoder | None,
        states: bool,
        drop: float,
        both: float,
        every: int,
    ) -> None:
        """`states`: of all places, not the embedding of the whole. `encoder` may be None where batches have states."""
        super().__init__(denoise, every, STATES, "image_sensitivity")
        self._drop, self._both, self._states = drop, both, states
        self._encoder = (encoder,)  # in a tuple: it is no part of what trains

    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        seen = batch if STATES in batch else {**batch, STATES: self.states(batch)}
        return super().forward(seen, rng)

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """(B, F) or (B, S, F) of a batch's pictures. Raises ValueError for a batch without any."""
        if FEATURES in batch and REFERENCE not in batch:
            return batch[FEATURES].to(self.device, non_blocking=True).float()
        pixels = batch.get(REFERENCE, None if "image" not in batch else (batch["image"] + 1) / 2)
        encoder = self._encoder[0]
        if pixels is None or encoder is None:
            raise ValueError(
                f"the batch has no pictures to be prompts, and no cached {FEATURES} of them; add the pair {REFERENCE}: "
                "{kind: picture} to data.pairs, or let task.cache make the cache"
            )
        return encoder(encoder.fitted(pixels.to(self.device, non_blocking=True)), states=self._states)

    def prepared(self, batch: Batch, rng: Rng) -> Batch:
        """With the states of no picture for those that are dropped."""
        if not self._drop or batch[STATES].is_meta:
            return batch
        encoder, states = self._encoder[0], batch[STATES].to(self.device)
        assert encoder is not None
        start = self.denoise.options.drop - self._both  # captions are dropped where the same number is below `drop`
        u = rng.uniform("drop")
        gone = ((u >= start) & (u < start + self._drop)).to(states.device)
        blank = encoder.blank(states=self._states).to(states)
        return {**batch, STATES: torch.where(gone.view(-1, *[1] * (states.ndim - 1)), blank, states)}
