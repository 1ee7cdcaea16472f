"""What a loss over latents is fed: latents and text conditioning of a batch, cached or encoded by frozen models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ldm.models.unet.controlnet import CONDITION
from ldm.models.unet.image_prompt import STATES
from ldm.models.vae.latents import LatentCodec
from ldm.rng import Rng
from ldm.sampling.texts import encoder_of, is_sequence, is_text, lengthened, mask_of, padded, trimmed
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

    `drop`: share of samples whose caption becomes the empty prompt; `each`: the same for each text encoder on its own,
    in their order. `live`: the text encoder trains, so captions are encoded at every step with gradients. Raises
    ValueError unless `each` is as long as there are encoders.
    """

    def __init__(
        self,
        codec: LatentCodec,
        encode_text: EncodeText,
        drop: float,
        *,
        each: Sequence[float] = (),
        live: bool = False,
    ) -> None:
        self.drop, self._each, self._live = drop, tuple(each), live
        self._codec, self._encode_text = codec, encode_text
        with torch.no_grad():
            self._empty = _wide(encode_text([""]))
            self._short = trimmed(self._empty)
        _check_each(self._each, self._empty)

    @property
    def empty(self) -> Cond:
        return self._empty

    @torch.no_grad()
    def latents(self, batch: Batch, rng: Rng, device: torch.device) -> Tensor:
        """Scaled latents (B, Z, h, w), a draw from the posterior."""
        if "moments" in batch:
            moments = batch["moments"].to(device, non_blocking=True)
        else:
            moments = self._codec.moments(batch["image"].to(device, non_blocking=True)).float()
        noise = rng.normal("posterior", (moments.shape[1] // 2, *moments.shape[2:]))
        return self._codec.sample(moments, noise.to(moments))

    def cond(self, batch: Batch, rng: Rng, device: torch.device, part: float = 1.0) -> Cond:
        """Text states, dropped ones replaced by those of the empty prompt, and SDXL's sizes if the data has them.

        `part`, in [0, 1], of the shares is dropped.
        """
        dropped = rng.uniform("drop") < part * self.drop
        if self._live:
            captions = ["" if gone else c for c, gone in zip(batch["caption"], dropped.tolist(), strict=True)]
            out = self._encoded(captions, device)
            if self._each:
                out = self._emptied(out, self._encoded([""], device), rng, None, device, part)
        else:
            out = self._frozen(batch, rng, dropped, device, part)
        for key in (CONDITION, STATES):
            if key in batch:
                out[key] = batch[key].to(device, non_blocking=True)
        if all(name in batch for name in SIZES):
            out["time_ids"] = torch.cat([batch[name].to(device) for name in SIZES], dim=1).float()
        return out

    @torch.no_grad()
    def _frozen(self, batch: Batch, rng: Rng, dropped: Tensor, device: torch.device, part: float) -> Cond:
        cached = {k: v.to(device, non_blocking=True) for k, v in batch.items() if is_text(k) and isinstance(v, Tensor)}
        cond = self._whole(cached) or self._encoded(batch["caption"], device)
        return self._emptied(cond, self._short, rng, dropped, device, part)

    def _encoded(self, captions: Sequence[str], device: torch.device) -> Cond:
        """What the text encoders give, wherever they are."""
        return {k: v.to(device) for k, v in _wide(self._encode_text(captions)).items()}

    def _whole(self, cached: Cond) -> Cond:
        """Texts of families without masks as long as their encoders give them: caches leave zeros at the end out."""
        free = [k for k in cached if is_sequence(k) and k in self._empty and mask_of(k) not in cached]
        return cached | {k: lengthened(cached[k], self._empty[k].shape[1]) for k in free}

    def _emptied(
        self, cond: Cond, empty: Cond, rng: Rng, dropped: Tensor | None, device: torch.device, part: float
    ) -> Cond:
        """`cond` with the empty prompt in the place of dropped texts (B,), and of those of each encoder on its own."""
        empty = {k: v.to(device) for k, v in empty.items() if k in cond or k.partition(".")[0] == "mask"}
        cond, empty = padded([cond, empty])
        gone = torch.zeros(len(rng), dtype=torch.bool) if dropped is None else dropped
        alone = [gone | (rng.uniform(f"drop {i}") < part * share) for i, share in enumerate(self._each)]
        out = {}
        for name, value in cond.items():
            rows = (alone[encoder_of(name)] if alone else gone).to(device)
            out[name] = torch.where(rows.view(-1, *[1] * (value.ndim - 1)), empty[name].to(value), value)
        return out


def _wide(cond: Cond) -> Cond:
    """In float32, masks as they are."""
    return {k: v.float() if v.is_floating_point() else v for k, v in cond.items()}


def _check_each(each: tuple[float, ...], empty: Cond) -> None:
    count = len({encoder_of(key) for key in empty if is_text(key)})
    if each and len(each) != count:
        raise ValueError(f"drop_each: expected a share for each of {count} text encoders, got {list(each)}")
