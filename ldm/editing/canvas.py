"""A picture as it is edited, and edits of it in batches. Legend: B pictures, Z latent channels, h, w latent pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from torch import Tensor

from ldm.data.decode import to_rgb
from ldm.data.grid import to_pil
from ldm.data.images import to_float
from ldm.pipeline import Progress, Settings, TextToImage
from ldm.rng import Rng
from ldm.sampling.memory import enough_memory
from ldm.sampling.run import Progress as StepProgress
from ldm.sampling.run import counted
from ldm.sampling.settings import Size


@dataclass(frozen=True)
class Canvas:
    """A picture as it is edited: `picture` at its final size, `padded` to what the model can draw, its settings.

    Without a size in the settings the picture keeps its own, padded right and below by copies of its edge.
    """

    picture: Image.Image
    padded: Image.Image
    settings: Settings

    @staticmethod
    def of(pipe: TextToImage, image: Image.Image, settings: Settings) -> Canvas:
        """The picture at the settings' size, or its own. Raises ValueError for a size that the model cannot make."""
        rgb = to_rgb(image)
        if settings.size is not None:
            height, width = pipe.size(settings.size)
            picture = rgb.resize((width, height), Image.Resampling.BICUBIC)
            return Canvas(picture, picture, replace(settings, size=(height, width)))
        multiple = max(8, pipe.codec.factor * pipe.network.multiple)
        more = [(0, -side % multiple) for side in (rgb.height, rgb.width)]
        padded = Image.fromarray(np.pad(np.asarray(rgb), [*more, (0, 0)], mode="edge")) if any(map(max, more)) else rgb
        return Canvas(rgb, padded, replace(settings, size=(padded.height, padded.width)))

    def latents(self, pipe: TextToImage) -> Tensor:
        """(1, Z, h, w) of the padded picture."""
        return pipe.encode(pixels(self.padded))

    def cut(self, pictures: Sequence[Image.Image]) -> list[Image.Image]:
        """Pictures of the padded size without what was added."""
        return [p if p.size == self.picture.size else p.crop((0, 0, *self.picture.size)) for p in pictures]


def encode(pipe: TextToImage, image: Image.Image, size: Size | None = None) -> Tensor:
    """Latents (1, Z, h, w) of a picture scaled to a size in pixels, or of its own size as `Canvas` has it."""
    return Canvas.of(pipe, image, Settings(size=size)).latents(pipe)


def pixels(image: Image.Image) -> Tensor:
    """(1, 3, H, W) in [-1, 1]."""
    return to_float(np.array(image, np.uint8)[None])


def pictures_of(pipe: TextToImage, latents: Tensor, settings: Settings) -> list[Image.Image]:
    """Decoded latents (B, Z, h, w)."""
    return to_pil(pipe.decode(latents, settings))


Batch = Callable[[int, Rng, StepProgress | None], Tensor]
"""(rows, their randomness, progress) -> latents (rows, Z, h, w)."""


def batches(
    pipe: TextToImage,
    canvas: Canvas,
    prompt: str,
    count: int,
    draw: Batch,
    steps: int,
    progress: Progress | None,
    *,
    checked: Settings | None = None,
) -> list[Image.Image]:
    """`count` pictures, `settings.batch` at a time; picture i's noise belongs to (seed, i).

    `checked`: settings of what the network sees at a time, where that is not the whole.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    settings, found = canvas.settings, []
    pipe.check([prompt], checked or settings)
    starts = range(0, count, settings.batch)
    for k, start in enumerate(starts):
        rows = min(settings.batch, count - start)
        step = None if progress is None else counted(progress, k * steps, len(starts) * steps)
        with enough_memory(pipe.size(settings.size), rows):
            latents = draw(rows, Rng(settings.seed, tuple(range(start, start + rows))), step)
            found += pictures_of(pipe, latents, settings)
    return canvas.cut(found)
