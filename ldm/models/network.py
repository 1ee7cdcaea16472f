"""The seam between denoising networks and everything that trains, draws, stores or plans them.

Legend: B batch, C channels, H, W latent pixels, T tokens.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.models.recomputing import Twice
from ldm.types import Cond

Granularity = Literal["none", "transformer", "block"]
Looks = Literal["own", "cross", "joint"]
"""What an attention layer relates: the picture to itself, the picture to the text, or both to both, text first."""


class Fetches(Protocol):
    """Brings a network's blocks to a device, and takes them away (`models.streaming`)."""

    device: torch.device

    def fetch(self, module: nn.Module) -> None:
        """Bring the block that has the module."""
        ...

    def stop(self) -> None:
        """Leave the network as it was."""
        ...


@dataclass
class Tap:
    """Keeps what a network has at one of its `places`: maps (B, F, h, w), or the tokens of the picture (B, N, F)."""

    place: str
    value: Tensor | None = None


class Network(nn.Module, ABC):
    """A denoising network: noisy latents, times and conditioning -> the raw prediction."""

    title: ClassVar[str] = "network"
    """What messages call it."""
    component: ClassVar[str] = "network"
    """Its folder in diffusers' layout, and the first word of its layers' names in adapters' files."""
    config: Any
    in_channels: int
    """Channels that it takes: those of the latents and of what is concatenated to them."""
    out_channels: int
    """Channels of its answer."""
    needs: frozenset[str]
    """Keys of `cond` that `forward` must be given; `prepared` may have put others in their place."""
    guidance_is_scale: ClassVar[bool] = False
    """Whether cond "guidance" is the guidance scale (FLUX.1), not the scale - 1 (arXiv 2210.03142)."""
    multiple: int = 1
    """Heights and widths in latent pixels are multiples of this."""
    compiled_sizes: ClassVar[bool | None] = None
    """torch.compile's `dynamic` for its blocks: None makes sizes variables once a second one is seen, True at once."""
    compiled_widths: bool = False
    """Whether compiled blocks of one class compute alike but for their widths, which can be variables as well."""
    streaming: Fetches | None = None
    """Where its blocks come and go (`models.streaming`)."""
    tap: Tap | None = None
    """What looks at its features inside of `forward` (`tapped`)."""
    averaged: int = 1
    """Side of the squares of latent pixels of which each one it is given is the mean (`of_averages`)."""

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """(B, C, H, W) at times t (B,) or (1,) under `cond` -> (B, C', H, W)."""

    @property
    def side(self) -> int:
        """The side in latent pixels that it draws where none is asked for."""
        return self.own_side or 64

    @property
    def own_side(self) -> int | None:
        """The side in latent pixels that its settings tell; None where they tell none."""
        return getattr(self.config, "sample_size", None)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError for latents that it cannot take, in latent pixels."""

    @property
    def has_dropout(self) -> bool:
        """Whether it answers otherwise in training."""
        return bool(getattr(self.config, "dropout", 0.0))

    def prepared(self, cond: Cond) -> Cond:
        """The same conditioning with all that is equal at every step computed once; `forward` gives the same values."""
        return cond

    def prepared_numbers(self, rows: int, tokens: int) -> int:
        """How many numbers `prepared` keeps for rows of so many tokens."""
        return 0

    @abstractmethod
    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules in the order in which they run: the units of moving between devices."""

    def compiled_blocks(self) -> Iterator[nn.Module]:
        """The modules of which equal ones are compiled once (`models.compiling`)."""
        yield from (block for _, block in self.blocks())

    def hidden(self) -> Iterator[Tensor]:
        """The matrices between its first and last layers: weights of the blocks' linear layers and convolutions."""
        for _, block in self.blocks():
            yield from (m.weight for m in block.modules() if isinstance(m, nn.Linear | nn.Conv2d))

    @abstractmethod
    def enable_gradient_checkpointing(self, on: bool | Granularity = True) -> None:
        """What training computes again in the backward pass instead of keeping it: "block" (True), the least memory;
        "transformer": each transformer block alone; "none" (False). Raises ValueError for another name.
        """

    @abstractmethod
    def correctable(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Layers that adapters may correct: name, module and group.

        Groups are attention, feed_forward, projection, convolution, time and other.
        """

    def attention_layers(self) -> Iterator[tuple[str, nn.Module, Looks]]:
        """Layers whose weights go through their attribute `control` where it is not None (`models.control`).

        Raises ValueError for a network whose layers have none.
        """
        raise ValueError(f"the {self.title} has no attention layers that can be watched or edited")

    def middle(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Features (B, F, h, w) half way through `forward`, for a classifier; the second half does not run.

        Raises ValueError for a network that has none.
        """
        raise ValueError(f"the {self.title} gives no features half way")

    @property
    def middle_channels(self) -> int:
        """F of `middle`."""
        raise ValueError(f"the {self.title} gives no features half way")

    @property
    def middle_groups(self) -> int:
        """Groups of a norm over `middle`."""
        return math.gcd(32, self.middle_channels)

    def places(self) -> dict[str, int]:
        """Where a `Tap` can be, in running order, and how many features F there are; empty where it cannot."""
        return {}

    @property
    def usual_place(self) -> str:
        """The place of the features that are aligned where none is asked for."""
        raise ValueError(f"the {self.title} shows no features inside")

    def pass_by(self, place: str, x: Tensor) -> None:
        """Give the features at a place to the tap, if it waits there."""
        if self.tap is not None and self.tap.place == place:
            self.tap.value = x

    def told_guidance(self, width: int | None) -> Network:
        """A copy that is told the guidance scale by an embedding of this width, and answers as this one at the start.

        None keeps what there is. Raises ValueError where it has one of another width, or cannot have one.
        """
        if width is not None:
            raise ValueError(f"guidance_embedding: the {self.title} has no place for one; write null")
        return copy.deepcopy(self).requires_grad_(True)

    @property
    def guidance_width(self) -> int | None:
        """Width of its embedding of the guidance scale, None without."""
        return None

    def run_again(self, step: Any, *args: Any, on: bool) -> Tensor:
        """`step(*args)`, computed again in the backward pass where `on` and training."""
        if on and self.training and torch.is_grad_enabled():
            told = step if self.streaming is None else Twice(step)
            return cast("Tensor", checkpoint(told, *args, use_reentrant=False))
        return step(*args)

    def fetch(self, module: nn.Module) -> None:
        """To be called before a module inside of a block is used without a call of the block itself."""
        if self.streaming is not None:
            self.streaming.fetch(module)

    def runs_on(self, weight: Tensor) -> torch.device:
        """The device on which one of its weights is used."""
        return weight.device if self.streaming is None else self.streaming.device


@contextmanager
def tapped(network: Network, place: str) -> Iterator[Tap]:
    """Inside, `forward` leaves its features at a place in the tap."""
    tap = network.tap = Tap(place)
    try:
        yield tap
    finally:
        network.tap = None


@contextmanager
def of_averages(network: Network, side: int) -> Iterator[None]:
    """Inside, pixels of latents are means of `side` x `side`: positions are those of the whole picture's squares."""
    network.averaged = side
    try:
        yield
    finally:
        network.averaged = 1


class Around(nn.Module):
    """What trains around a network that it holds without registering it; called as the network is."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self._network = (network,)

    @property
    def network(self) -> Network:
        """The one inside."""
        return self._network[0]

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self._network[0](x, t, cond)


NO_HIDDEN = (
    "train.optim.algorithm: 'muon' is for a denoising network whose own weights train, and here none do (low-rank "
    "corrections, tokens, autoencoders and CLIP have no hidden matrices of one); use adamw, adamw8bit, lion or sgd"
)


def hidden(module: nn.Module) -> list[Tensor]:
    """The hidden matrices of all denoising networks that are registered in a module."""
    return [p for m in module.modules() if isinstance(m, Network) for p in m.hidden()]


def granularity(on: bool | Granularity) -> Granularity:
    """A setting of gradient checkpointing by its name. Raises ValueError for another name."""
    chosen = {True: "block", False: "none"}[on] if isinstance(on, bool) else on
    if chosen not in get_args(Granularity):
        raise ValueError(f"gradient_checkpointing {chosen!r} is not one of {list(get_args(Granularity))}")
    return cast("Granularity", chosen)
