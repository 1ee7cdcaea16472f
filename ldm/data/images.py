"""Pictures to squares or buckets of uint8, and uint8 to float32 in [-1, 1]."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Fit = Literal["crop", "pad", "stretch"]
MAX_COVER = 16


def resize(image: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
    """Resize with antialiasing for a target (width, height).

    "crop": the smallest picture that covers it (crop is left to do); "pad": fits inside, on white; "stretch": exactly.
    What would cover it more than MAX_COVER times along a side loses its ends first: a line of 20,000 pixels would
    take gigabytes.
    """
    width, height = size
    if fit == "crop":
        image = _shortened(image, width / height)
    if fit == "stretch":
        return image.resize(size, Image.Resampling.BICUBIC)
    scales = (width / image.width, height / image.height)
    scale = max(scales) if fit == "crop" else min(scales)
    new = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    new = (max(new[0], width), max(new[1], height)) if fit == "crop" else (min(new[0], width), min(new[1], height))
    resized = image if new == image.size else image.resize(new, Image.Resampling.BICUBIC)
    if fit == "crop" or new == size:
        return resized
    ground = Image.new("RGB", size, (255, 255, 255))
    ground.paste(resized, ((width - new[0]) // 2, (height - new[1]) // 2))
    return ground


def _shortened(image: Image.Image, aspect: float) -> Image.Image:
    """The middle of a picture that is more than MAX_COVER times longer or wider than the aspect asks for."""
    width = min(image.width, math.ceil(image.height * aspect * MAX_COVER))
    height = min(image.height, math.ceil(image.width / aspect * MAX_COVER))
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def crop_box(have: tuple[int, int], want: tuple[int, int], where: tuple[float, float]) -> tuple[int, int]:
    """Top-left (left, top) of a crop; `where` in [0, 1) per axis, (0.5, 0.5) is the centre."""
    left = int(where[0] * (have[0] - want[0] + 1))
    top = int(where[1] * (have[1] - want[1] + 1))
    return left, top


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W, 3) uint8."""
    return np.asarray(image, np.uint8)


def to_float(images: NDArray[np.uint8]) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]: 0 is -1 and 255 is 1."""
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return planes.mul_(2.0 / 255.0).sub_(1.0)


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """(B, 3, H, W) in [-1, 1], clipped -> (B, H, W, 3) uint8, rounded."""
    scaled = images.detach().float().clamp(-1, 1).add(1.0).mul(127.5).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
