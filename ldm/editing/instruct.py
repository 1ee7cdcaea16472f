"""Editing by an instruction with a network that is told the picture (InstructPix2Pix, arXiv 2211.09800)."""

from __future__ import annotations

from dataclasses import replace

from PIL import Image
from torch import Tensor

from ldm.editing.canvas import Canvas, batches, pixels
from ldm.pipeline import Progress, Settings, TextToImage
from ldm.rng import Rng
from ldm.sampling.run import Progress as StepProgress

PICTURE_SCALE = 1.5
"""Guidance by the picture where none is asked for, as diffusers has it."""


def instruct(
    pipe: TextToImage,
    image: Image.Image,
    instruction: str,
    *,
    settings: Settings,
    count: int = 1,
    progress: Progress | None = None,
) -> list[Image.Image]:
    """A picture changed as an instruction says, at `Canvas`' size.

    `settings.guidance` is of the instruction, `settings.image_guidance` of the picture: the higher it is, the less is
    changed. Raises ValueError for a network that is not told the picture before the edit.
    """
    if settings.image_guidance is None:
        settings = replace(settings, image_guidance=PICTURE_SCALE)
    canvas = Canvas.of(pipe, image, settings)
    given = pipe.concat.original(pixels(canvas.padded))

    def draw(rows: int, rng: Rng, step: StepProgress | None) -> Tensor:
        told = {key: value.expand(rows, *value.shape[1:]) for key, value in given.items()}
        return pipe.latents([instruction] * rows, canvas.settings, rng, step, given=told)

    return batches(pipe, canvas, instruction, count, draw, settings.steps, progress)
