"""Pictures to squares or buckets of uint8, and uint8 to float32 in [-1, 1]."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

Fit = Literal["crop", "pad", "stretch"]
MAX_COVER = 16


def resize(image: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
    """Resize with antialiasing for a target (width, height).

    "crop": the smallest picture that covers it (crop is left to do); "pad": fits inside, on white; "stretch": exactly.
    What would cover it more than MAX_COVER times along a side loses its ends first: a line of 20,000 pixels would
    take gigabytes.
    """
    box, new = _plan(image.size, size, fit)
    if box != (0, 0, *image.size):
        image = image.crop(box)
    resized = image if new == image.size else image.resize(new, Image.Resampling.BICUBIC)
    if fit != "pad" or new == size:
        return resized
    ground = Image.new("RGB", size, (255, 255, 255))
    ground.paste(resized, ((size[0] - new[0]) // 2, (size[1] - new[1]) // 2))
    return ground


def fit_pixels(values: NDArray[np.uint8], size: tuple[int, int], fit: Fit) -> NDArray[np.uint8]:
    """`resize` of (H, W, 3) uint8 by torch's kernel, which is faster than PIL's and less than half a level
    from it on average. The result may lie in memory as planes, as the kernel leaves it."""
    (left, top, right, bottom), new = _plan((values.shape[1], values.shape[0]), size, fit)
    values = values[top:bottom, left:right]
    if new != (values.shape[1], values.shape[0]):
        if new[0] == 1:  # where torch is wrong on processors without AVX2
            values = np.asarray(Image.fromarray(values).resize(new, Image.Resampling.BICUBIC))
        else:
            values = values if values.flags.writeable else values.copy()
            planes = torch.from_numpy(values).permute(2, 0, 1)[None]
            planes = functional.interpolate(planes, size=(new[1], new[0]), mode="bicubic", antialias=True)
            values = planes[0].permute(1, 2, 0).numpy()
    if fit == "pad" and new != size:
        ground = np.full((size[1], size[0], 3), 255, np.uint8)
        left, top = (size[0] - new[0]) // 2, (size[1] - new[1]) // 2
        ground[top : top + new[1], left : left + new[0]] = values
        return ground
    return values


def fit_partner(
    values: NDArray[np.uint8],
    of: tuple[int, int],
    size: tuple[int, int],
    fit: Fit,
    *,
    nearest: bool = False,
    ground: int = 255,
) -> NDArray[np.uint8]:
    """What `fit_pixels` makes of a picture of (width, height) `of`, made of its partner (H, W, C), whatever its size.

    So a crop of both shows the same part. With "pad" it lies on `ground`.
    """
    height, width, channels = values.shape
    box, new = _plan(of, size, fit)
    left, top, right, bottom = (round(v * n / o) for v, n, o in zip(box, (width, height) * 2, of * 2))
    values = values[top : max(bottom, top + 1), left : max(right, left + 1)]
    if new != (values.shape[1], values.shape[0]):
        if nearest or new[0] == 1:
            how = Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC
            flat = values if channels == 3 else values[:, :, 0]
            values = np.asarray(Image.fromarray(np.ascontiguousarray(flat)).resize(new, how)).reshape(*new[::-1], -1)
        else:
            planes = torch.from_numpy(values.copy()).permute(2, 0, 1)[None]
            planes = functional.interpolate(planes, size=(new[1], new[0]), mode="bicubic", antialias=True)
            values = planes[0].permute(1, 2, 0).numpy()
    if fit == "pad" and new != size:
        whole = np.full((size[1], size[0], channels), ground, np.uint8)
        left, top = (size[0] - new[0]) // 2, (size[1] - new[1]) // 2
        whole[top : top + new[1], left : left + new[0]] = values
        return whole
    return values


def _plan(have: tuple[int, int], size: tuple[int, int], fit: Fit) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """What of a picture (left, top, right, bottom) becomes which (width, height)."""
    if fit == "stretch":
        return (0, 0, *have), size
    width, height = size
    box = _middle(have, width / height) if fit == "crop" else (0, 0, *have)
    have = (box[2] - box[0], box[3] - box[1])
    scales = (width / have[0], height / have[1])
    scale = max(scales) if fit == "crop" else min(scales)
    new = (max(1, round(have[0] * scale)), max(1, round(have[1] * scale)))
    if fit == "crop":
        return box, (max(new[0], width), max(new[1], height))
    return box, (min(new[0], width), min(new[1], height))


def _middle(have: tuple[int, int], aspect: float) -> tuple[int, int, int, int]:
    """All of a picture, or its middle if it is more than MAX_COVER times longer than the aspect asks for."""
    width = min(have[0], math.ceil(have[1] * aspect * MAX_COVER))
    height = min(have[1], math.ceil(have[0] / aspect * MAX_COVER))
    left, top = (have[0] - width) // 2, (have[1] - height) // 2
    return left, top, left + width, top + height


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
