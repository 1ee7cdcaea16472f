"""ControlNets at work: pictures that conditions are, and what they add to the U-Net at each step (arXiv 2302.05543).

Legend: B pictures of a batch, K channels of a condition, H, W its pixels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.models.families import check_control
from ldm.models.layers import unchanging
from ldm.models.network import Network
from ldm.models.transformers.flux_control import FluxControlNet
from ldm.models.transformers.sd3_control import SD3ControlNet
from ldm.models.unet.controlnet import CONDITION, ControlNet
from ldm.models.unet.encoder import Residuals
from ldm.models.vae.latents import LatentCodec
from ldm.pipeline.memory import Placement
from ldm.types import Cond, Net

AnyControl = ControlNet | SD3ControlNet | FluxControlNet
ASKED = "condition asked"
"""The key of `cond` that is 1 for rows of the prompt and 0 for those of the empty or negative one, in guess mode."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """A ControlNet and the picture that it is shown.

    `picture`: a PIL image, resized to what is drawn as diffusers does (Lanczos, stretched), or (K, H, W), or one a
    prompt (N, K, H, W), in [0, 1] and of the size that is drawn. `scale`: of what is added, 0 is without. It is added
    in the share of the steps between `start` and `end`. `guess`: to the prompt's half alone, and less at fine levels.
    `name`: what messages call it.
    """

    network: AnyControl
    picture: Image.Image | Tensor
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False
    name: str = "ControlNet"

    def __post_init__(self) -> None:
        check_use(self.scale, self.start, self.end, self.name)
        if self.guess and not self.network.guesses:
            raise ValueError(f"{self.name}: the {self.network.title} has no guess mode")
        if isinstance(self.picture, Tensor):
            check_pixels(self.picture, self.network.picture_channels, self.name)

    @property
    def halved(self) -> bool:
        """Whether the rows of the empty or negative prompt are left alone."""
        return self.guess or self.network.pools

    def pixels(self, size: tuple[int, int]) -> Tensor:
        """(1 or N, K, H, W) of a size (H, W). Raises ValueError for a tensor of another."""
        if isinstance(self.picture, Image.Image):
            return as_condition(self.picture, size, self.network.picture_channels)[None]
        found = self.picture if self.picture.ndim == 4 else self.picture[None]
        if tuple(found.shape[2:]) != size:
            shown, want = " x ".join(map(str, found.shape[2:])), f"{size[0]} x {size[1]}"
            raise ValueError(f"{self.name}: a condition of {shown} pixels, but {want} are drawn")
        return found


def check_use(scale: float, start: float, end: float, name: str = "control") -> None:
    """Raise ValueError for a scale below 0, and for a start and an end that are no share of the steps."""
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"{name}: scale must be at least 0, got {scale}")
    if not 0 <= start < end <= 1:
        raise ValueError(f"{name}: start and end are shares of the steps, 0 <= start < end <= 1; got {start}, {end}")


def check_pixels(picture: Tensor, channels: int, name: str) -> None:
    """Raise ValueError unless a tensor is (K, H, W) or (N, K, H, W) of `channels` in [0, 1]."""
    if picture.ndim not in (3, 4):
        raise ValueError(f"{name}: a condition is (K, H, W) or (N, K, H, W), got {list(picture.shape)}")
    if picture.shape[-3] != channels:
        raise ValueError(f"{name}: a condition of {picture.shape[-3]} channels, but this ControlNet takes {channels}")
    low, high = float(picture.min()), float(picture.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{name}: a condition lies in [0, 1], got values from {low:.3g} to {high:.3g}")


def as_condition(picture: Image.Image, size: tuple[int, int], channels: int) -> Tensor:
    """A picture as a condition (K, H, W) in [0, 1] of a size (H, W). Raises ValueError unless K is 1 or 3."""
    if channels not in (1, 3):
        raise ValueError(f"condition: a picture gives 1 or 3 channels, but this ControlNet takes {channels}")
    picture = picture.convert("RGB" if channels == 3 else "L")
    if picture.size != (size[1], size[0]):
        picture = picture.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture, dtype=np.float32) / 255
    return torch.from_numpy(pixels).reshape(size[0], size[1], channels).permute(2, 0, 1).contiguous()


class Controls:
    """Several ControlNets over one U-Net; what they add is summed.

    `given` is what the network itself is told beside, rows (1 or N, ...).
    """

    def __init__(self, controls: Sequence[Control], given: Cond | None = None) -> None:
        self.controls, self._given = list(controls), given or {}
        self._codec: LatentCodec | None = None
        self._place: Placement | None = None

    def on(self, network: Network, codec: LatentCodec, place: Placement) -> Controls:
        """This, with its ControlNets where the network is, in the type of its weights; those that train stay.

        Raises ValueError for a ControlNet of another family.
        """
        self._codec, self._place = codec, place
        dtype = next(network.parameters()).dtype
        for control in self.controls:
            check_control(control.network.config, network.config, control.name, "the model")
            if not any(p.requires_grad for p in control.network.parameters()):
                control.network.to(device=place.target, dtype=dtype)
        return self

    def beside(self, given: Cond) -> Controls:
        """These, with more that the network is told."""
        other = copy.copy(self)
        other._given = self._given | given
        return other

    @property
    def networks(self) -> list[AnyControl]:
        """Those that are at work."""
        return [control.network for control in self.controls]

    def told(self, size: tuple[int, int], rows: Sequence[int]) -> Cond:
        """The pictures as the ControlNets take them, for H x W pixels; `rows`: the places in all prompts.

        Raises ValueError for pictures of another size, or for fewer pictures than prompts.
        """
        found: Cond = {}
        for i, control in enumerate(self.controls):
            pixels = control.pixels(size)
            if len(pixels) > 1:
                if max(rows) >= len(pixels):
                    raise ValueError(f"{control.name}: {len(pixels)} conditions, but more prompts")
                pixels = pixels[list(rows)]
            found[_key(i)] = self._taken(control, pixels)
        found |= {key: value if len(value) == 1 else value[list(rows)] for key, value in self._given.items()}
        if any(control.halved for control in self.controls):
            found[ASKED] = torch.ones(1)
        return found

    def _taken(self, control: Control, pixels: Tensor) -> Tensor:
        """What a ControlNet takes of pixels: themselves, or their latents."""
        assert self._codec is not None
        assert self._place is not None
        codec = self._codec

        def encode(images: Tensor) -> Tensor:
            assert self._place is not None
            with self._place.used(codec.autoencoder):
                return codec.encode(images.to(self._place.target))

        return control.network.shown(pixels, encode, codec.shift * codec.scale)

    @property
    def unasked(self) -> Cond:
        """What conditioning without the prompt is told."""
        return {ASKED: torch.zeros(1)} if any(control.halved for control in self.controls) else {}

    def working(self, steps: int) -> ExitStack:
        """Inside, what is the same at every step is computed once."""
        stack = ExitStack()
        for network in self.networks:
            stack.enter_context(unchanging(network, steps))
        return stack

    def around(self, net: Net, times: Callable[[], Sequence[float]], place: Placement) -> Net:
        """The network with what is added; `times` gives those of the steps. `net` takes `residuals`."""
        if not self.controls:
            return net
        steps = times()
        spans = [span(steps, control.start, control.end) for control in self.controls]

        def controlled(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            plain = {k: v for k, v in cond.items() if k != ASKED and k.partition(".")[0] != CONDITION}
            added: Any = None
            for i, (control, between) in enumerate(zip(self.controls, spans, strict=True)):
                if control.scale == 0 or (between is not None and not _inside(t, between)):
                    continue
                shown = {**plain, CONDITION: _shown(cond, i, control).to(x.device)}
                with place.autocast(control.network):
                    found = _asked(control, x, t, shown, cond[ASKED]) if control.halved else control.network(
                        x, t, shown, control.scale, guess=control.guess
                    )  # fmt: skip
                if found is not None:
                    added = found if added is None else added.plus(found)
            return net(x, t, plain) if added is None else net(x, t, plain, residuals=added)  # type: ignore[call-arg]

        return controlled


def _key(i: int) -> str:
    return f"{CONDITION}.{i}"


def _shown(cond: Cond, i: int, control: Control) -> Tensor:
    if _key(i) not in cond:
        raise ValueError(f"{control.name}: no picture to be shown; cond has {sorted(cond)}")
    return cond[_key(i)]


def _asked(control: Control, x: Tensor, t: Tensor, cond: Cond, asked: Tensor) -> Residuals | None:
    """What is added to the rows of the prompt, and zeros to the others, which the ControlNet does not see.

    None where there are no rows of the prompt.
    """
    rows = asked.nonzero().flatten()
    if not len(rows):
        return None
    mine = {key: value[rows] if len(value) == len(x) else value for key, value in cond.items() if key != "copies"}
    found = control.network(x[rows], t[rows] if len(t) == len(x) else t, mine, control.scale, guess=control.guess)
    if len(rows) == len(x):
        return found
    whole = [part.new_zeros(len(x), *part.shape[1:]).index_copy_(0, rows, part) for part in (*found.down, found.mid)]
    return Residuals(tuple(whole[:-1]), whole[-1])


def span(times: Sequence[float], start: float, end: float) -> tuple[float, float] | None:
    """The times of the steps i of N with i / N >= start and (i + 1) / N <= end, as diffusers has them; None of all.

    The borders lie half way to the neighbouring steps. Where no step is inside, low is above high.
    """
    count = len(times)
    inside = [i for i in range(count) if not (i / count < start or (i + 1) / count > end)]
    if len(inside) == count:
        return None
    if not inside:
        return math.inf, -math.inf
    first, last = inside[0], inside[-1]
    high = math.inf if first == 0 else (times[first - 1] + times[first]) / 2
    low = -math.inf if last == count - 1 else (times[last] + times[last + 1]) / 2
    return low, high


def _inside(t: Tensor, between: tuple[float, float]) -> bool:
    return between[0] <= float(t.flatten()[0]) <= between[1]
