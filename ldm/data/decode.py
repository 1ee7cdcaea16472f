"""Bytes -> upright RGB picture, whatever strangers store; what cannot be read is a BadSample with a reason."""

from __future__ import annotations

import codecs
import io
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ldm.data import jpeg

IMAGES = ("webp", "jpg", "jpeg", "png", "bmp", "gif", "tif", "tiff", "ppm")
MAX_PIXELS = 100_000_000


class BadSample(ValueError):
    """A sample that cannot be used; `reason` is a short word to count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def picture(data: bytes, *, at_least: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode to mode RGB: first frame, turned by EXIF, transparency on white, 16 bits scaled to 8.

    With `at_least` (width, height), JPEGs may be decoded at reduced scale as long as they cover it either way round.
    Raises BadSample with reason empty, unknown_format, huge or damaged.
    """
    if not data:
        raise BadSample("empty", "zero bytes")
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise BadSample("huge", str(error)) from error
    except UnidentifiedImageError as error:
        raise BadSample("unknown_format", f"{len(data)} bytes are no known picture format") from error
    except Exception as error:  # PIL's plugins raise whatever their parsers meet
        raise BadSample("damaged", f"{type(error).__name__}: {error}") from error
    if image.width * image.height > max_pixels:
        raise BadSample("huge", f"{image.width}x{image.height} pixels, at most {max_pixels} in all")
    try:
        if at_least is not None and image.format == "JPEG":
            image.draft("RGB", (max(at_least), max(at_least)))
        image.load()
        turned = ImageOps.exif_transpose(image)
        return to_rgb(turned)
    except BadSample:
        raise
    except Exception as error:
        raise BadSample("damaged", f"{type(error).__name__}: {error}") from error


def upright(
    data: bytes, *, at_least: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """`picture` as (H, W, 3) uint8, by the fastest way, and its whole (width, height). Raises BadSample."""
    found = jpeg.header(data)
    if found is not None and found.width * found.height <= max_pixels:
        values = jpeg.pixels(data, found, jpeg.scale_for(found, at_least))
        if values is not None:
            return values, (found.width, found.height)
    return np.asarray(picture(data, at_least=at_least, max_pixels=max_pixels)), upright_size(data)


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) after turning by EXIF, from the header alone. BadSample if there is none."""
    if not data:
        raise BadSample("empty", "zero bytes")
    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else image.size
    except Image.DecompressionBombError as error:
        raise BadSample("huge", str(error)) from error
    except Exception as error:  # PIL's plugins raise whatever their parsers meet
        raise BadSample("damaged", f"{type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Mode RGB; transparency is composited on the background."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (*background, 255))
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return image.convert("RGB")


def _deep(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit or float grey -> 8-bit grey; PIL's own convert would clip instead of scaling."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise BadSample("damaged", "not finite")
    top = values.max(initial=0.0)
    scale = 1.0 if image.mode == "I" and top <= 255 else 255.0 if top <= 1.0 else 255.0 / 65535.0
    return Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8), "L")


def image_member(members: dict[str, bytes]) -> bytes:
    """The picture among a sample's members; BadSample if there is none."""
    for extension in IMAGES:
        if extension in members:
            return members[extension]
    raise BadSample("no_picture", f"members {sorted(members)}")


def text(data: bytes) -> str:
    """UTF-8 text with the ends stripped; BadSample otherwise."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample("not_utf8", str(error)) from error


def metadata(members: dict[str, bytes]) -> dict[str, Any]:
    """The json member, or nothing; BadSample if it does not parse to keys and values."""
    if "json" not in members:
        return {}
    try:
        tree = json.loads(str(members["json"].removeprefix(codecs.BOM_UTF8), "utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", str(error)) from error
    if not isinstance(tree, dict):
        raise BadSample("bad_json", f"expected keys and values, got {type(tree).__name__}")
    return tree
