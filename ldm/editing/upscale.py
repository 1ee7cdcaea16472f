"""Super-resolution with a network that is told a small picture, in tiles where that is large (arXiv 2112.10752)."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
from PIL import Image
from torch import Tensor

from ldm.data.decode import to_rgb
from ldm.editing.canvas import Canvas, batches, pixels
from ldm.pipeline import Progress, Settings, TextToImage
from ldm.rng import Rng
from ldm.sampling.run import Progress as StepProgress
from ldm.sampling.tiles import check_tiles, tiled

LEVEL = 20
"""Noise on the small picture where none is asked for, as diffusers has it."""


def upscale(
    pipe: TextToImage,
    image: Image.Image,
    prompt: str = "",
    *,
    level: int = LEVEL,
    tile: int | None = None,
    overlap: int | None = None,
    settings: Settings,
    count: int = 1,
    progress: Progress | None = None,
) -> list[Image.Image]:
    """A picture as many times as large as the autoencoder's latents are small.

    `level` of the noise on it, which the network is told: higher for worse pictures, and more is made up. A picture of
    more than `tile` of its pixels a side (the network's own size) is drawn in tiles that `overlap` (a quarter of them).
    With `settings.size`, of the result, it is resized first. Raises ValueError for a network that is told no small
    picture, and for a level that it does not know.
    """
    pipe.concat.check_level(level)
    factor = pipe.codec.factor
    tile = pipe.network.side if tile is None else tile
    overlap = max(1, tile // 4) if overlap is None else overlap
    check_tiles(tile, overlap)
    canvas = _canvas(pipe, image, settings)
    small = pixels(canvas.padded)
    size = canvas.padded.height, canvas.padded.width
    parts = max(size) > tile
    if parts and canvas.settings.tile is None:
        canvas = replace(canvas, settings=replace(canvas.settings, tile=max(64, tile * factor)))
    wrap = functools.partial(tiled, tile=tile, overlap=overlap) if parts else None

    def draw(rows: int, rng: Rng, step: StepProgress | None) -> Tensor:
        noise = rng.normal("low resolution", (3, *size))
        given = pipe.concat.small(small.expand(rows, -1, -1, -1), level, noise)
        return pipe.latents([prompt] * rows, canvas.settings, rng, step, given=given, wrap=wrap)

    checked = replace(canvas.settings, size=None)  # no size is odd: large ones are drawn in tiles
    return batches(pipe, canvas, prompt, count, draw, settings.steps, progress, checked=checked)


def _canvas(pipe: TextToImage, image: Image.Image, settings: Settings) -> Canvas:
    """The large picture's place, the small one padded to what can be drawn, and the size that is."""
    factor, small = pipe.codec.factor, to_rgb(image)
    if settings.size is not None:
        height, width = pipe.size(settings.size)
        small = small.resize((width // factor, height // factor), Image.Resampling.BICUBIC)
    multiple = max(8, factor) // factor
    more = [(0, -side % multiple) for side in (small.height, small.width)]
    padded = Image.fromarray(np.pad(np.asarray(small), [*more, (0, 0)], mode="edge"))
    large = Image.new("RGB", (small.width * factor, small.height * factor))
    return Canvas(large, padded, replace(settings, size=(padded.height * factor, padded.width * factor)))
