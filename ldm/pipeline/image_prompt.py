"""Pictures as prompts: IP-Adapters at work (arXiv 2308.06721).

Legend: B pictures of a batch, N tokens of a picture, F features of the image encoder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.models.families import check_ip_adapter
from ldm.models.network import Network
from ldm.models.text.vision import ImageEncoder
from ldm.models.unet.encoder import IMAGE_KV
from ldm.models.unet.image_prompt import IPAdapter, joined, places, weighted
from ldm.pipeline.memory import Placement
from ldm.types import Cond


@dataclass(frozen=True, kw_only=True)
class ImagePrompt:
    """A picture that is a prompt, the IP-Adapter that tells the network of it, and the encoder that sees it.

    `picture`: several are looked at together, as one; with `each` there is one for each prompt. `scale`: of what is
    found in it, 0 is without. `name`: what messages call it.
    """

    adapter: IPAdapter
    encoder: ImageEncoder
    picture: Image.Image | Sequence[Image.Image]
    scale: float = 1.0
    each: bool = False
    name: str = "image prompt"

    def __post_init__(self) -> None:
        check_scale(self.scale, self.name)
        check_encoder(self.adapter, self.encoder, self.name)
        if not self.pictures:
            raise ValueError(f"{self.name}: expected at least one picture")

    @property
    def pictures(self) -> list[Image.Image]:
        """All of them."""
        return [self.picture] if isinstance(self.picture, Image.Image) else list(self.picture)


def check_scale(scale: float, name: str) -> None:
    """Raise ValueError for a scale below 0."""
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"{name}: scale must be at least 0, got {scale}")


def check_encoder(adapter: IPAdapter, encoder: ImageEncoder, name: str) -> None:
    """Raise ValueError for an encoder of another width than the adapter's."""
    config = adapter.config
    found = encoder.of(config.sees_states)
    if found != config.features:
        what = "states" if config.sees_states else "embeddings"
        raise ValueError(f"{name}: the image encoder {encoder.name} gives {what} of {found} features, but this "
                         f"IP-Adapter takes {config.features}")  # fmt: skip


class ImagePrompts:
    """Several pictures as prompts of one network; what is found in each is added."""

    def __init__(self, prompts: Sequence[ImagePrompt]) -> None:
        self.prompts = [prompt for prompt in prompts if prompt.scale > 0]
        self._states: dict[tuple[int, bool], Tensor] = {}
        self._network: Network | None = None
        self._place: Placement | None = None

    def on(self, network: Network, place: Placement) -> ImagePrompts:
        """This, with its adapters where the network is, in the type of its weights; those that train stay.

        Raises ValueError for an adapter of another family.
        """
        self._network, self._place = network, place
        dtype = next(network.parameters()).dtype
        dtype = dtype if dtype.is_floating_point else torch.float32
        for prompt in self.prompts:
            check_ip_adapter(prompt.adapter.config, network.config, prompt.name, "the model")
            if not any(p.requires_grad for p in prompt.adapter.parameters()):
                prompt.adapter.to(device=place.target, dtype=dtype)
            prompt.encoder.to(place.target)
        return self

    @property
    def modules(self) -> list[nn.Module]:
        """Adapters and encoders that are at work, each once."""
        found = [m for prompt in self.prompts for m in (prompt.adapter, prompt.encoder)]
        return list(dict.fromkeys(found))

    def told(self, rows: Sequence[int]) -> Cond:
        """What the network is told of them; `rows`: the places in all prompts.

        Raises ValueError for fewer pictures than prompts where each prompt has its own.
        """
        return {_key(i): self._of(i, rows) for i in range(len(self.prompts))}

    @property
    def unasked(self) -> Cond:
        """What it is told without them, B = 1: what has zeros in the picture's place."""
        return {_key(i): self._of(i, None) for i in range(len(self.prompts))}

    def _of(self, i: int, rows: Sequence[int] | None) -> Tensor:
        assert self._place is not None
        assert self._network is not None
        prompt, states = self.prompts[i], self._seen(i, rows is not None)
        if prompt.each and rows is not None:
            if max(rows) >= len(states):
                raise ValueError(f"{prompt.name}: {len(states)} pictures, but more prompts")
            states = states[list(rows)]
        order = places(self._network.config)
        with self._place.used(prompt.adapter), self._place.autocast(self._network):
            device = next(prompt.adapter.parameters()).device
            kv = prompt.adapter(states.to(device), [number for number, _ in order])
        kv = weighted(kv, prompt.scale, [channels for _, channels in order])
        kv = kv if prompt.each else joined(kv)
        return kv if rows is None else kv.expand(len(rows), -1, -1)

    def _seen(self, i: int, asked: bool) -> Tensor:
        """States (B, F) or (B, S, F) of the pictures, kept; or of none, as many."""
        assert self._place is not None
        prompt, at = self.prompts[i], (i, asked)
        if at not in self._states:
            encoder, states = prompt.encoder, prompt.adapter.config.sees_states
            with self._place.used(encoder):
                if asked:
                    seen = [encoder(encoder.pixels([p]), states=states) for p in prompt.pictures]
                    self._states[at] = torch.cat(seen).cpu()
                else:
                    blank = encoder.blank(states=states)
                    self._states[at] = blank if prompt.each else torch.cat([blank] * len(prompt.pictures))
        return self._states[at]


def _key(i: int) -> str:
    return f"{IMAGE_KV}.{i}"
