"""Colours of an embedded ICC profile -> sRGB, which is what models are trained and shown in."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

_SAME = 2
"""Levels of 255 by which a profile may differ from sRGB and still be taken for it: profiles of sRGB differ by one."""


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """A picture of mode L, RGB or CMYK as sRGB by its profile, mode RGB; as it is, where the profile is sRGB's.

    A profile that is broken or of another kind of picture is not used, as viewers do.
    """
    made = None if not profile else _transform(profile, image.mode)
    if made is None:
        return image
    from PIL import ImageCms

    converted = ImageCms.applyTransform(image, made)
    return image if converted is None else converted


def is_srgb(profile: bytes) -> bool:
    """Whether pixels of mode RGB under this profile are sRGB's already."""
    return _transform(profile, "RGB") is None


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> Any:
    try:
        from PIL import ImageCms
    except ImportError:  # Pillow without LittleCMS
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        made = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "RGB":
            probe = _probe()
            shown = ImageCms.applyTransform(probe, made)
            apart = np.asarray(shown, np.int16) - np.asarray(probe, np.int16)
            return made if np.abs(apart).max() > _SAME else None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return made


def _probe() -> Image.Image:
    """Colours from all over the cube."""
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(9, 81, 3))
