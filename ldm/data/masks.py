"""Random masks of what is to be painted: boxes, brush strokes, one side, or all of a picture."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Draw = Callable[[str], float]
"""A number in [0, 1) that belongs to a sample and a purpose."""


def random_mask(kind: str, size: tuple[int, int], draw: Draw) -> NDArray[np.uint8]:
    """A mask (H, W) uint8 of (width, height), 255 where it is to be painted; never empty.

    "rectangles": one to four, each side an eighth to a half of the picture's; "strokes": one to four of a round brush
    that turns as it goes; "half": one side, a quarter to three quarters of the picture; "whole": all of it.
    """
    image = Image.new("L", size, 0)
    _KINDS[kind](ImageDraw.Draw(image), size, draw)
    return np.asarray(image, np.uint8)


def _rectangles(canvas: ImageDraw.ImageDraw, size: tuple[int, int], draw: Draw) -> None:
    for i in range(1 + int(4 * draw("count"))):
        sides = [max(1, round(n * (1 + 3 * draw(f"side {i} {axis}")) / 8)) for axis, n in enumerate(size)]
        first = [int(draw(f"place {i} {axis}") * (n - s + 1)) for axis, (n, s) in enumerate(zip(size, sides))]
        canvas.rectangle((*first, first[0] + sides[0] - 1, first[1] + sides[1] - 1), fill=255)


def _strokes(canvas: ImageDraw.ImageDraw, size: tuple[int, int], draw: Draw) -> None:
    short = min(size)
    for i in range(1 + int(4 * draw("count"))):
        width = max(1, round(short * (0.04 + 0.12 * draw(f"width {i}"))))
        x, y = (draw(f"start {i} {axis}") * (n - 1) for axis, n in enumerate(size))
        angle = 2 * math.pi * draw(f"angle {i}")
        _dot(canvas, x, y, width)
        for j in range(2 + int(7 * draw(f"length {i}"))):
            angle += (draw(f"turn {i} {j}") - 0.5) * 1.5 * math.pi
            step = short * (0.08 + 0.2 * draw(f"step {i} {j}"))
            to = x + step * math.cos(angle), y + step * math.sin(angle)
            canvas.line((x, y, *to), fill=255, width=width)
            x, y = to
            _dot(canvas, x, y, width)


def _dot(canvas: ImageDraw.ImageDraw, x: float, y: float, width: int) -> None:
    half = width / 2
    canvas.ellipse((x - half, y - half, x + half, y + half), fill=255)


def _half(canvas: ImageDraw.ImageDraw, size: tuple[int, int], draw: Draw) -> None:
    axis, last = int(2 * draw("axis")), draw("side") < 0.5
    long = size[axis]
    part = min(max(1, round(long * (0.25 + 0.5 * draw("part")))), long)
    box = [0, 0, size[0] - 1, size[1] - 1]
    box[axis + (0 if last else 2)] = long - part if last else part - 1
    canvas.rectangle(tuple(box), fill=255)


def _whole(canvas: ImageDraw.ImageDraw, size: tuple[int, int], draw: Draw) -> None:
    canvas.rectangle((0, 0, *size), fill=255)


_KINDS = {"rectangles": _rectangles, "strokes": _strokes, "half": _half, "whole": _whole}
KINDS = tuple(_KINDS)
