"""What a loss over latents is fed: latents and text conditioning of a batch, cached or encoded by frozen models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ldm.models.vae.latents import LatentCodec
from ldm.rng import Rng
from ldm.types import Batch, Cond

SIZES = ("original_size", "crop_top_left", "target_size")
"""The batch's keys, (B, 2) each as (height, width) or (top, left), in the order of SDXL's six numbers."""

EncodeText = Callable[[Sequence[str]], Cond]
"""Prompts -> Cond with batch axis B."""


class Feed(Protocol):
    """Clean samples and their conditioning; `empty` is that of no prompt, with batch axis 1."""

    @property
    def empty(self) -> Cond: ...

    def latents(self, batch: Batch, rng: Rng, device: torch.device) -> Tensor: ...

    def cond(self, batch: Batch, rng: Rng, device: torch.device) -> Cond: ...


class LatentFeed:
    """Batches of cached moments and text, or of pixels and captions, which the frozen codec and towers encode.

    `drop`: share of samples whose caption becomes the empty prompt. `live`: the text encoder trains, so captions are
    encoded at every step with gradients.
    """

    def __init__(self, codec: LatentCodec, encode_text: EncodeText, drop: float, *, live: bool = False) -> None:
        self.drop, self._live = drop, live
        self._codec, self._encode_text = codec, encode_text
        with torch.no_grad():
            self._empty = {k: v.float() for k, v in encode_text([""]).items()}

    @property
    def empty(self) -> Cond:
        return self._empty

    @torch.no_grad()
    def latents(self, batch: Batch, rng: Rng, device: torch.device) -> Tensor:
        """Scaled latents (B, Z, h, w), a draw from the posterior."""
        if "moments" in batch:
            moments = batch["moments"].to(device)
        else:
            moments = self._codec.moments(batch["image"].to(device)).float()
        noise = rng.normal("posterior", (moments.shape[1] // 2, *moments.shape[2:]))
        return self._codec.sample(moments, noise.to(moments))

    def cond(self, batch: Batch, rng: Rng, device: torch.device) -> Cond:
        """Text states, dropped ones replaced by those of the empty prompt, and SDXL's sizes if the data has them."""
        dropped = rng.uniform("drop") < self.drop
        if self._live:
            captions = ["" if gone else c for c, gone in zip(batch["caption"], dropped.tolist(), strict=True)]
            out = {k: v.float() for k, v in self._encode_text(captions).items()}
        else:
            out = self._frozen(batch, dropped.to(device), device)
        if all(name in batch for name in SIZES):
            out["time_ids"] = torch.cat([batch[name].to(device) for name in SIZES], dim=1).float()
        return out

    @torch.no_grad()
    def _frozen(self, batch: Batch, dropped: Tensor, device: torch.device) -> Cond:
        if "text" in batch:
            cond = {k: batch[k].to(device) for k in ("text", "pooled") if k in batch}
        else:
            cond = {k: v.float() for k, v in self._encode_text(batch["caption"]).items()}
        out = {}
        for name, value in cond.items():
            mask = dropped.view(-1, *[1] * (value.ndim - 1))
            out[name] = torch.where(mask, self._empty[name].to(value), value)
        return out
