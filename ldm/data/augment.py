"""Pictures made different at every step: colours and a small rotation, by numbers that belong to the sample's place."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

Pixels = NDArray[np.uint8]
Draw = Callable[[str], float]
"""A purpose -> a number in [0, 1)."""


def augmented(picture: Pixels, colour: float, degrees: float, draw: Draw) -> Pixels:
    """A picture (H, W, 3): brightness, contrast and saturation each times 1 +- `colour`, turned by +- `degrees`."""
    image = Image.fromarray(picture)
    if colour:
        for name in ("Brightness", "Contrast", "Color"):
            factor = 1 + colour * (2 * draw(f"colour {name}") - 1)
            image = getattr(ImageEnhance, name)(image).enhance(factor)
    if degrees:
        image = turned(image, degrees * (2 * draw("rotate") - 1))
    return np.asarray(image)


def turned(image: Image.Image, angle: float) -> Image.Image:
    """Turned about its middle, anticlockwise, and enlarged so far that no corner is empty; of the same size."""
    width, height = image.size
    radians = math.radians(abs(angle))
    sine, cosine = math.sin(radians), math.cos(radians)
    zoom = max(cosine + sine * height / width, cosine + sine * width / height)
    a, b = math.cos(math.radians(angle)) / zoom, -math.sin(math.radians(angle)) / zoom
    x, y = width / 2, height / 2  # output (u, v) is read at the middle plus the turned difference to it
    coefficients = (a, b, x - a * x - b * y, -b, a, y + b * x - a * y)
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
