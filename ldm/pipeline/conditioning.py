"""Prompts and sizes -> what the network is told at every step."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ldm.models.network import Network
from ldm.models.text import MissingT5, T5Encoder, T5Tokenizer, TextEncoder, encode_texts
from ldm.models.text.captions import clean
from ldm.models.text.prompts import count_chunks, cut_off, encode_prompts, notes
from ldm.pipeline.memory import Placement
from ldm.sampling.settings import Settings, far_size, said
from ldm.types import Cond

PREPARED_BYTES = 1 << 28
"""Up to this size what a batch's text becomes in the network is kept for all steps."""


@dataclass(frozen=True)
class Conditioning:
    """The parts of a pipeline that make conditioning."""

    network: Network
    text: Sequence[TextEncoder]
    placement: Placement
    prepare: bool = True
    """Whether what the network makes of the text is kept in its place; ControlNets want the text."""

    def of(self, prompts: Sequence[str], settings: Settings, together: Sequence[str], own: tuple[int, int]) -> Cond:
        """What the network is told of prompts at every step, and what it makes of that alone, computed once.

        As many chunks as the longest of `together`, all prompts of the batch, and the negative prompt needs. `own` is
        the size in pixels (H, W) that is drawn.
        """
        chunks = self.chunks(together, settings)
        with self.placement.used(*self.text):
            cond = encode_prompts(self.text, prompts, weighted=settings.weights, chunks=chunks)
        cond |= self.sizes(len(prompts), own, settings)
        if self.network.guidance_is_scale and self.network.guidance_width is not None:
            device = self.placement.device_of(self.network)
            cond["guidance"] = torch.full((len(prompts),), settings.guidance, dtype=torch.float32, device=device)
        tokens = sum(value.shape[1] for key, value in cond.items() if key.partition(".")[0] == "text")
        size = 4 * self.network.prepared_numbers(2 * len(together), tokens)
        # without `together` the other half may come from elsewhere, as text
        if self.prepare and 0 < size <= PREPARED_BYTES:
            with self.placement.used(self.network), self.placement.autocast(self.network):
                cond = self.network.prepared(cond)
        return cond

    def plain(self, prompts: Sequence[str], own: tuple[int, int]) -> Cond:
        """Prompts as they are, of pictures that are not cropped."""
        with self.placement.used(*self.text):
            return encode_texts(self.text, prompts) | self.sizes(len(prompts), own)

    def chunks(self, prompts: Sequence[str], settings: Settings) -> int:
        """How many contexts the longest of the prompts and the negative one fill."""
        if not settings.long:
            return 1
        every = [*prompts, settings.negative]
        told = [encoder.tokenizer for encoder in self.text if not isinstance(encoder, MissingT5)]
        return max(count_chunks(tokenizer, every, weighted=settings.weights) for tokenizer in told)

    def batches(self, prompts: Sequence[str], settings: Settings) -> list[list[int]]:
        """Places in `prompts` that are drawn together: in their order, long prompts only with others as long.

        Empty chunks of text would change a picture, and what it is may not depend on its neighbours.
        """
        groups: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(self.chunks([prompt], settings), []).append(i)
        size = settings.batch
        return [places[k : k + size] for places in groups.values() for k in range(0, len(places), size)]

    def sizes(self, count: int, own: tuple[int, int], told: Settings | None = None) -> Cond:
        """What the network is told of the picture's size.

        SDXL "time_ids" (N, 6): height and width before cropping, the crop's top and left, height and width.
        PixArt-alpha "resolution" (N, 2), height and width, and "aspect_ratio" (N, 1), height / width.
        """
        original, crop, target = (own, (0, 0), own) if told is None else (told.original, told.crop, told.target)
        known = {
            "time_ids": [*(original or own), *crop, *(target or own)],
            "resolution": [*own],
            "aspect_ratio": [own[0] / own[1]],
        }
        device = self.placement.device_of(self.network)
        rows = {k: torch.tensor([v], dtype=torch.float32, device=device) for k, v in known.items()}
        return {key: row.expand(count, -1) for key, row in rows.items() if key in self.network.needs}

    def cautions(
        self, prompts: Sequence[str], settings: Settings, size: tuple[int, int], own: tuple[int, int]
    ) -> list[str]:
        """Sentences on what may not be drawn as it was meant; `size` is drawn, `own` is the model's (H, W)."""
        lines = self.unsaid(prompts, settings) + said(settings, told=self.network.guidance_width is not None)
        far = None if self.network.own_side is None else far_size(size, own)
        return lines if far is None else [*lines, far]

    def unsaid(self, prompts: Sequence[str], settings: Settings) -> list[str]:
        """Sentences on parts of prompts that may not mean what was meant, and on what is cut off."""
        every = list(dict.fromkeys([*prompts, settings.negative]))
        lines = notes(every, weighted=settings.weights, long=settings.long)
        cuts = [] if settings.long else cut_off(self.text, every, weighted=settings.weights)
        return lines + [f"prompt of {c.tokens} tokens is longer than {c.limit}; left out: {c.cut!r}" for c in cuts]


def clean_captions(text: Sequence[TextEncoder], title: str, on: bool) -> None:
    """Clean prompts as PixArt's pipelines do, or do not; `title` is the family's, for the message.

    Raises ValueError where no encoder knows of it, and without the packages that this needs.
    """
    found = [e.tokenizer for e in text if isinstance(e, T5Encoder) and e.config.lower]
    told = [tokenizer for tokenizer in found if isinstance(tokenizer, T5Tokenizer)]
    if not told:
        raise ValueError(f"clean_captions: is PixArt's; the model is {title}")
    if on:
        clean("")  # says what is missing before anything is drawn
    for tokenizer in told:
        tokenizer.clean = on


def warn(lines: Sequence[str], level: int) -> None:
    """A warning a line, at the caller's caller `level` up."""
    for line in lines:
        warnings.warn(line, stacklevel=level + 1)
