"""What the transformers share as networks: their inputs, what is computed once, blocks that are recomputed or skipped.

Legend: B batch, C channels, H, W latent pixels.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm.models.layers import Embedding
from ldm.models.network import Granularity, Network
from ldm.models.transformers.blocks import Modulation, TimeTextEmbedding, Vector
from ldm.models.transformers.routing import Span
from ldm.models.transformers.times import Times
from ldm.types import Cond, Net

NOTHING: frozenset[int] = frozenset()
RAW = frozenset({"text", "pooled", "mask"})
"""What text encoders give, each under its own number where there are several: "text.0", "mask.1"."""


class Transformer(Network):
    """A denoising transformer over patches of latents.

    `latent_channels`: of the latents it takes, without cond "concat"; `known`: the key that `prepared` leaves in the
    place of the text, `known_width` its numbers a token; `groups`: group of layers -> a pattern in their names, of
    which the first that is found tells a layer's.
    """

    component = "transformer"
    latent_channels: int
    known: str
    groups: ClassVar[Mapping[str, str]]
    recompute: bool = False
    routing: Span | None = None
    """The blocks around which training leads the image tokens that cond "route" (B, K) does not name."""
    known_times: Times | None = None
    """What `known_times` of `ldm.models.transformers.times` keeps while a picture is drawn."""

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, cond: Cond, *, skip: frozenset[int] = NOTHING) -> Tensor:
        """(B, C, H, W) at times t (B,) or (1,) in 0 ... 1000 -> (B, C', H, W), without the blocks of numbers `skip`."""

    @abstractmethod
    def prepared(self, cond: Cond) -> Cond:
        """What of the conditioning is the same at every step, computed once; `forward` takes either, alike bit for bit.

        Every tensor has the batch first, so that rows may be joined and chosen. Raises ValueError for a missing key.
        """

    def joined(self, cond: Cond) -> Cond:
        """The conditioning with what several text encoders gave ("text.0", "pooled.1" and so on) as one text.

        As it is where there is one text already.
        """
        return cond

    def correctable(self) -> Iterator[tuple[str, nn.Module, str]]:
        """All linear layers and the patches' convolution."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                group = (g for g, pattern in self.groups.items() if re.search(pattern, name))
                yield name, module, next(group, "other")

    def prepared_numbers(self, rows: int, tokens: int) -> int:
        return rows * tokens * self.known_width

    @property
    @abstractmethod
    def known_width(self) -> int:
        """Numbers a token of what `prepared` leaves in the place of the text."""

    @property
    def depth(self) -> int:
        """How many blocks `skip` counts."""
        return sum(1 for _ in self.blocks())

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.config.width

    def places(self) -> dict[str, int]:
        """The picture's tokens after each block that `skip` counts, by its number."""
        return {str(i): self.width for i in range(self.depth)}

    @property
    def usual_place(self) -> str:
        """After a third of the blocks: REPA's 8 of 24 (arXiv 2410.06940, SiT-L)."""
        return str(max(0, self.depth // 3 - 1))

    def without(self, blocks: Sequence[int]) -> Net:
        """The network without these blocks (counted in running order), for skip-layer guidance; on the same weights.

        Raises ValueError for a block that there is not.
        """
        count = self.depth
        for block in blocks:
            if not 0 <= block < count:
                raise ValueError(f"block {block} cannot be skipped: there are blocks 0 to {count - 1}")
        return partial(self, skip=frozenset(blocks))

    def enable_gradient_checkpointing(self, on: bool | Granularity = True) -> None:
        """Compute each block again in the backward pass ("block", True) or keep what it computed ("none", False)."""
        chosen = {True: "block", False: "none"}[on] if isinstance(on, bool) else on
        if chosen not in ("block", "none"):
            raise ValueError(f"gradient_checkpointing {on!r} is not one of ['block', 'none']")
        self.recompute = chosen == "block"

    def _run(self, block: nn.Module, *args: Any) -> Any:
        own = (a if not isinstance(a, Mapping) else tuple(a[m] for m in modulations(block)) for a in args)
        return self.run_again(block, *own, on=self.recompute)

    def timed(self, times: Sequence[float], limit: int) -> Times | None:
        """Its modulations at these times in at most `limit` bytes; None without modulations of the time and text."""
        embedding = getattr(self, "time_text_embed", None)
        layers = modulations(self)
        known = isinstance(embedding, TimeTextEmbedding)
        return Times(embedding, layers, times, limit, self.fetch) if known else None

    def _vector(self, embedding: TimeTextEmbedding, t: Tensor, constant: Tensor) -> Vector:
        """What blocks are told of the time and of what `TimeTextEmbedding.constant` gave."""
        known = None if self.known_times is None else self.known_times.of(t, constant)
        return embedding(t, constant) if known is None else known

    def _latents(self, x: Tensor, cond: Cond, channels: int) -> Tensor:
        """x with cond "concat" (B, C'', H, W) after its channels, in the weights' type, checked."""
        if "concat" in cond:
            x = torch.cat([x, cond["concat"].to(x.dtype)], dim=1)
        if x.shape[1] != channels:
            raise ValueError(f"{self._name} takes {channels} channels, got {x.shape[1]} (with concat)")
        if x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise ValueError(
                f"{self._name} takes sides that are multiples of {self.multiple}, got {tuple(x.shape[2:])}"
            )
        return x.to(self._dtype)

    def _ready(self, cond: Cond) -> Cond:
        return cond if self.known in cond else self.prepared(cond)

    def _outputs(self, cond: Cond, name: str) -> list[Tensor]:
        """What each text encoder that has it gave under `name`, in their order."""
        keys = sorted((key for key in cond if key.startswith(f"{name}.")), key=lambda key: int(key.split(".")[1]))
        return [cond[key] for key in keys]

    def _told(self, cond: Cond, **widths: int) -> dict[str, Tensor]:
        """The tensors of these keys in the weights' type, checked against the width of their last axis."""
        for key in sorted(self.needs):
            if key not in cond:
                raise ValueError(f"{self._name} needs cond {key!r}; got {sorted(cond)}")
        if "guidance" in cond and "guidance" not in self.needs:
            raise ValueError(f'cond "guidance" needs guidance_embeds, which this {self._name} has not')
        for key, width in widths.items():
            if cond[key].shape[-1] != width:
                raise ValueError(f"cond {key!r} has {cond[key].shape[-1]} channels, {self._name} takes {width}")
        return {key: cond[key].to(self._dtype) for key in widths}

    def _rest(self, cond: Cond, *used: str) -> Cond:
        """The conditioning without these keys, and without the texts of encoders that `joined` has used."""
        return {key: value for key, value in cond.items() if key not in used and key.split(".")[0] not in RAW - {key}}

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def _start(self, zero: Iterable[nn.Module]) -> None:
        """Xavier for Linears and patches, 0.02 for embeddings of vectors, zero for modulations and `zero` (DiT).

        Modulations are told their places.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                _zero(module.bias)
        for module in self.modules():
            if isinstance(module, Embedding):
                nn.init.normal_(module.linear_1.weight, std=0.02)
                nn.init.normal_(module.linear_2.weight, std=0.02)
        layers = [*zero, *(m.linear for m in self.modules() if isinstance(m, Modulation))]
        for layer in layers:
            _zero(*layer.parameters())
        for _, block in self.blocks():
            for place, own in enumerate(modulations(block)):
                own.place = place


def modulations(module: nn.Module) -> list[Modulation]:
    """Those inside, in the order of its modules."""
    return [m for m in module.modules() if isinstance(m, Modulation)]


def _zero(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            nn.init.zeros_(tensor)


def check_counts(config: object, *names: str) -> None:
    """Raise ValueError unless each of these settings is at least 1."""
    for name in names:
        value = vars(config)[name]
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
