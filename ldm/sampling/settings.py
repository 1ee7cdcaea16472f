"""How pictures are drawn: the settings, what they cannot be, and what is said of those that may surprise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ldm.sampling.guidance import check_guide
from ldm.sampling.registry import lookup

Size = int | tuple[int, int]
"""Pixels: one side, or (H, W)."""
FAR = 2.0
"""Sizes of so many times the area of the model's own, or of its side, or that much smaller, are said."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How pictures are drawn; None means the sampler's or the model's own. `size` is in pixels, one side or (H, W).

    `weights` reads "(word:1.3)" in prompts, `long` takes prompts beyond the towers' context in chunks. What SDXL is
    told of a picture, in pixels (H, W): `original` and `target` sizes (None: the size drawn), `crop` its top and left.
    Less memory: `tile`, pixels a side of the parts in which pictures are decoded; `slices`, one picture decoded at a
    time; `queries`, how many pixels attend at a time. `guide`: see `ldm.sampling.guidance`; `interval` in shares of T.
    `image_guidance`: of the picture that an editor by instructions is told, beside `guidance` of the text.
    Skip-layer guidance: the blocks `skip_layers` are left out, `skip_interval` in shares of the steps.
    """

    sampler: str = "ddim"
    """The sampler, of those that `ldm sample --list-samplers` names."""
    steps: int = 50
    """Sampler steps."""
    guidance: float = 7.5
    guide: Literal["cfg", "projected", "perpendicular"] = "cfg"
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    """Guidance rescale, 0 (off) to 1: less over-exposure at high guidance."""
    negative: str = ""
    """The negative prompt."""
    eta: float | None = None
    """Noise added in each step, 0 to 1; null is the sampler's own."""
    spacing: str | None = None
    """Time spacing, such as trailing or karras; null is the sampler's own."""
    seed: int = 0
    """Any whole number."""
    size: Size | None = None
    batch: int = 16
    """Pictures at a time, at least 1."""
    weights: bool = False
    long: bool = False
    original: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None
    tile: int | None = None
    slices: bool = False
    queries: int | None = None
    skip_layers: tuple[int, ...] = ()
    skip_scale: float = 2.8
    """Strength of skip-layer guidance."""
    skip_interval: tuple[float, float] = (0.01, 0.2)
    image_guidance: float | None = None

    @staticmethod
    def of(given: Mapping[str, Any]) -> Settings:
        """From keywords. Raises ValueError for one that there is not."""
        try:
            return Settings(**given)
        except TypeError as error:
            allowed = sorted(Settings.__dataclass_fields__)
            raise ValueError(f"{sorted(set(given) - set(allowed))}: unknown; allowed are {allowed}") from error

    def __post_init__(self) -> None:
        lookup(self.sampler)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not isinstance(self.seed, int):
            raise ValueError(f"seed must be a whole number, got {self.seed!r}")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"guidance must be at least 0, got {self.guidance}")
        if self.image_guidance is not None and not (math.isfinite(self.image_guidance) and self.image_guidance >= 0):
            raise ValueError(f"image_guidance must be at least 0, got {self.image_guidance}")
        if self.image_guidance is not None and (self.guide != "cfg" or self.skip_layers):
            raise ValueError("image_guidance: goes with guide 'cfg' alone, and without skip_layers")
        check_guide(self.guide, self.rescale, self.interval)
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        for name, least in (("tile", 64), ("queries", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self._check_skipping()

    def _check_skipping(self) -> None:
        for block in self.skip_layers:
            if isinstance(block, bool) or not isinstance(block, int) or block < 0:
                raise ValueError(f"skip_layers: expected numbers of blocks from 0 on, got {block!r}")
        if len(set(self.skip_layers)) != len(self.skip_layers):
            raise ValueError(f"skip_layers: a block is named twice in {list(self.skip_layers)}")
        if not math.isfinite(self.skip_scale):
            raise ValueError(f"skip_scale must be a number, got {self.skip_scale}")
        low, high = self.skip_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"skip_interval must be two shares of the steps, 0 <= low <= high <= 1, got {low}, {high}")


def said(settings: Settings, *, told: bool) -> list[str]:
    """Guidance that does not do what its name says; `told`: the network has guidance inside and is told its scale."""
    scale, lines = settings.guidance, []
    if told and scale < 1:
        lines.append(f"guidance {scale:g} is below 1: this model has guidance inside and never saw such a scale")
    elif scale == 0:
        lines.append(
            "guidance 0 ignores the prompt: the negative or empty one is drawn; 1 is the prompt alone, which other "
            "programs call 0"
        )
    elif scale < 1:
        lines.append(f"guidance {scale:g} is below 1: it weakens the prompt; 1 is the prompt alone")
    if settings.negative and (told or (scale == 1 and settings.guide != "perpendicular")):
        why = "this model has guidance inside" if told else "guidance 1 is none"
        lines.append(f"the negative prompt has no effect: {why}")
    return lines


def checked_size(size: Size, multiple: int) -> tuple[int, int]:
    """(H, W) of a size. Raises ValueError, with the nearest that are allowed, unless both are multiples."""
    height, width = size if isinstance(size, tuple) else (size, size)
    for value in (height, width):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"size: expected whole numbers of pixels, got {value!r}")
        if value < multiple:
            raise ValueError(f"size: {value} is not a multiple of {multiple} pixels from {multiple} on")
        if value % multiple:
            low = value - value % multiple
            raise ValueError(
                f"size: {value} is not a multiple of {multiple} pixels; the nearest are {low} and {low + multiple}"
            )
    return height, width


def far_size(size: tuple[int, int], own: tuple[int, int]) -> str | None:
    """What to say of a size (H, W) that is far from the model's own; None if it is near."""
    area = size[0] * size[1] / (own[0] * own[1])
    longer = max(size) / max(own)
    if 1 / FAR < area <= FAR and longer <= FAR:
        return None
    what = "things may come twice" if area > FAR or longer > FAR else "little may be recognised"
    return f"size {size[0]} x {size[1]} is far from the model's own {own[0]} x {own[1]}: {what}"
