"""Bytes -> upright RGB picture, whatever strangers store; what cannot be read is a BadSample with a reason.

Every picture that enters comes through here, so that training, editing and measuring see the same.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, UnidentifiedImageError, features

from ldm.data import colour, jpeg, salvage
from ldm.data.bad import BadSample as BadSample
from ldm.data.formats import IMAGES as IMAGES
from ldm.data.formats import READ, UNREAD, unread
from ldm.data.texts import metadata as metadata
from ldm.data.texts import text as text

MAX_PIXELS = 100_000_000
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_T = TypeVar("_T")
Color = tuple[int, int, int]
WHITE: Color = (255, 255, 255)
BLACK: Color = (0, 0, 0)
_PNG_NOTES = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")


@dataclass(frozen=True)
class Decoded:
    """A picture as a viewer shows it, mode RGB, the format of its file, and of how many frames it is the first.

    `plain`: the file's own pixels are these; without transparency, rotation, another frame or a foreign profile.
    """

    image: Image.Image
    format: str
    frames: int
    plain: bool


def picture(
    data: bytes,
    *,
    at_least: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
    background: Color = WHITE,
) -> Image.Image:
    """Decode to mode RGB in sRGB: first frame, turned by EXIF, transparency on the background, 16 bits scaled to 8.

    With `at_least` (width, height), JPEGs may be decoded at reduced scale as long as they cover it either way round.
    Raises BadSample with reason empty, unknown_format, unsupported, huge or damaged.
    """
    return _guarded(lambda: to_rgb(_read(data, at_least, max_pixels), background))


def decoded(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Decoded:
    """`picture`, and what its file was. Raises BadSample."""

    def work() -> Decoded:
        image = _read(data, None, max_pixels)
        frames = _frames(image)
        foreign = bool(profile := image.info.get("icc_profile")) and not colour.is_srgb(profile)
        plain = image.mode == "RGB" and not image.has_transparency_data and orientation(image) == 1 and not foreign
        plain = plain and frames == 1 and image.format not in ("MPO", "TIFF")
        kind = str(image.format)
        return Decoded(to_rgb(image), kind, frames, plain)

    return _guarded(work)


def mask(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A mask as mode L, upright: its brightness times its opacity, so that what is not painted is black."""
    return _guarded(lambda: to_mask(_read(data, None, max_pixels)))


def layers(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, Image.Image | None]:
    """Colours (RGB, upright, sRGB) and opacity (L), None where all is opaque. Raises BadSample."""
    return _guarded(lambda: _layers(_upright(_read(data, None, max_pixels))))


def load(path: Path, *, stencil: bool = False) -> Image.Image:
    """`picture` of a file. With `stencil`, white alone, its shape in the transparency, stands on black.

    Raises ValueError that names the file.
    """
    shown = _named(path, picture)
    return _named(path, partial(picture, background=BLACK)) if stencil and _is_white(shown) else shown


def notes(path: Path) -> tuple[dict[str, str], bytes | str | None]:
    """The texts in a picture file by key, and EXIF's user comment as it is stored. Raises ValueError that names it."""

    def found(data: bytes) -> tuple[dict[str, str], bytes | str | None]:
        image = _opened(data)
        image.load()  # texts may follow the pixels
        texts = {k: v for k, v in image.info.items() if isinstance(k, str) and isinstance(v, str)}
        comment = None
        with contextlib.suppress(Exception):  # whatever Pillow's parser meets
            comment = image.getexif().get_ifd(0x8769).get(0x9286)
        return texts, comment if isinstance(comment, (bytes, str)) else None

    return _named(path, lambda data: _guarded(lambda: found(data)))


def frames(path: Path) -> int:
    """Frames or pages of a picture file, of which the first is taken; 1 where it cannot be read."""
    with contextlib.suppress(BadSample, OSError):
        data = path.read_bytes()
        return _guarded(lambda: _frames(_opened(data)))
    return 1


def _is_white(image: Image.Image) -> bool:
    return image.getextrema() == ((255, 255),) * 3


def load_mask(path: Path) -> Image.Image:
    """`mask` of a file. Raises ValueError that names it."""
    return _named(path, mask)


def _named(path: Path, how: Callable[[bytes], _T]) -> _T:
    try:
        return how(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: not a readable picture: {error.strerror or error}") from error
    except BadSample as error:
        raise ValueError(f"{path}: not a readable picture: {error}") from error


def upright(
    data: bytes, *, at_least: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """`picture` as (H, W, 3) uint8, by the fastest way, and its whole (width, height). Raises BadSample."""
    found = jpeg.header(data)
    if found is not None and found.width * found.height <= max_pixels:
        values = jpeg.pixels(data, found, jpeg.scale_for(found, at_least))
        if values is not None:
            return values, (found.width, found.height)
    image = picture(data, at_least=at_least, max_pixels=max_pixels)
    return np.asarray(image), image.size if at_least is None else _whole(data, image.size)


def _whole(data: bytes, size: tuple[int, int]) -> tuple[int, int]:
    """The size of a picture that was decoded to a size: only JPEGs are at reduced scale."""
    return upright_size(data) if data.startswith(b"\xff\xd8") else size


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) after turning by EXIF, from the header alone. BadSample if there is none."""

    def size(data: bytes) -> tuple[int, int]:
        with _opened(data) as image:
            if image.format == "PNG" and not any(mark in data for mark in _PNG_NOTES):
                return image.size  # Pillow would decode it all to look for EXIF behind the pixels
            turned = image.format != "TIFF" and orientation(image) >= 5  # Pillow tells a TIFF's size as it is shown
            return (image.height, image.width) if turned else image.size

    return _guarded(lambda: _salvaged(data, size))


def orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none, or none that can be read."""
    try:
        value = image.getexif().get(0x0112, 1)
        value = value[0] if isinstance(value, (tuple, list)) else value
        return value if (value := int(value)) in _TURNS else 1
    except Exception:  # whatever Pillow's parser meets; the pixels are good
        return 1


def to_rgb(image: Image.Image, background: Color = WHITE) -> Image.Image:
    """Any picture as mode RGB, upright and in sRGB; transparency is composited on the background."""
    colours, opacity = _layers(_upright(image))
    if opacity is None:
        return colours
    colours.putalpha(opacity)
    return Image.alpha_composite(Image.new("RGBA", colours.size, (*background, 255)), colours).convert("RGB")


def to_mask(image: Image.Image) -> Image.Image:
    """Any picture as a mask of mode L, upright: brightness times opacity."""
    colours, opacity = _layers(_upright(image))
    bright = colours.convert("L")
    return bright if opacity is None else ImageChops.multiply(bright, opacity)


def _read(data: bytes, at_least: tuple[int, int] | None, max_pixels: int) -> Image.Image:
    """Opened and decoded."""

    def whole(data: bytes) -> Image.Image:
        image = _opened(data)
        if image.width * image.height > max_pixels:
            raise BadSample("huge", f"{image.width}x{image.height} pixels, at most {max_pixels} in all")
        if at_least is not None and image.format == "JPEG":
            image.draft("RGB", (max(at_least), max(at_least)))
        image.load()
        return image

    return _salvaged(data, whole)


def _salvaged(data: bytes, how: Callable[[bytes], _T]) -> _T:
    """What `how` makes of the bytes; where only their notes are broken, of the bytes without them."""
    try:
        return how(data)
    except (BadSample, Image.DecompressionBombError):
        raise
    except Exception:
        rest = salvage.bare(data)
        if rest is None:
            raise
        with contextlib.suppress(Exception):  # the first error tells more
            return how(rest)
        raise


def _opened(data: bytes) -> Image.Image:
    if not data:
        raise BadSample("empty", "zero bytes")
    what = unread("", data[:512])
    if what is not None and not (what == "AVIF" and what in _formats()):
        raise BadSample("unsupported", f"{what} is not read here; convert it to PNG or JPEG")
    try:
        return Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError as error:
        raise _Unknown(len(data), what) from error


class _Unknown(Exception):
    """No parser takes the bytes: perhaps only for their notes."""

    def __init__(self, size: int, what: str | None) -> None:
        super().__init__(f"{size} bytes are no known picture format" if what is None else f"{what} that does not open")
        self.known = what is not None


@cache
def _formats() -> list[str]:
    """Formats that are read and that this Pillow was built with."""
    Image.init()
    return [f for f in READ if f in Image.OPEN and (f not in ("AVIF", "WEBP") or features.check(f.lower()))]


def _guarded(work: Callable[[], _T]) -> _T:
    """What the work gives; whatever goes wrong in it is a BadSample."""
    try:
        return work()
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("huge", str(error)) from error
    except _Unknown as error:
        raise BadSample("damaged" if error.known else "unknown_format", str(error)) from error
    except Exception as error:  # PIL's plugins raise whatever their parsers meet
        raise BadSample("damaged", f"{type(error).__name__}: {error}") from error


def _frames(image: Image.Image) -> int:
    """Frames or pages; a phone's MPO holds one picture and its preview or depth."""
    try:
        return 1 if image.format == "MPO" else max(1, int(getattr(image, "n_frames", 1)))
    except Exception:  # a later frame is damaged; the first is all that counts
        return 1


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # a TIFF is turned by that
    turn = _TURNS.get(orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.format = image.format
    return turned


def _layers(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours as RGB in sRGB, and opacity as L if there is any transparency; the result carries no notes."""
    profile, opacity = image.info.get("icc_profile"), None
    if image.mode.startswith("I") or image.mode == "F":
        clear = image.info.get("transparency")
        if isinstance(clear, int):  # the value that a deep grey PNG calls transparent
            opacity = Image.fromarray(np.where(np.asarray(image) == clear, 0, 255).astype(np.uint8), "L")
        image = _deep(image)
    elif image.has_transparency_data:
        image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode))
        image = image if image.mode == "LA" else image.convert("RGBA")
        opacity = image.getchannel("A")
        opacity = None if opacity.getextrema() == (255, 255) else opacity
        image = image.convert("L" if image.mode == "LA" else "RGB")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    colours = colour.to_srgb(image, profile).convert("RGB")
    colours.info = {}
    return colours, opacity


def _deep(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit or float grey -> 8-bit grey by its full scale; PIL's own convert would clip instead of scaling.

    32-bit and float pictures do not say their scale: it is the least of 1, 255, 65535 and 2^31 - 1 that holds them.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise BadSample("damaged", "not finite")
    top = values.max(initial=0.0)
    if image.mode.startswith("I;16") or image.format == "PNG":
        full = 65535.0
    elif image.mode == "F" and top <= 2.0:  # highlights above 1 are clipped
        full = 1.0
    else:
        full = next(f for f in (255.0, 65535.0, 2.0**31 - 1, max(top, 1.0)) if top <= f)
    return Image.fromarray(np.clip(np.rint(values * (255.0 / full)), 0, 255).astype(np.uint8), "L")


def image_member(members: Mapping[str, bytes]) -> bytes:
    """The picture among a sample's members; BadSample if there is none, or none that is read."""
    for extension in IMAGES:
        if extension in members:
            return members[extension]
    raise no_picture(members)


def no_picture(members: Collection[str]) -> BadSample:
    """What is wrong with a sample of these members."""
    for extension in members:
        if extension in UNREAD:
            return BadSample("unsupported", f"{UNREAD[extension]} is not read here; convert it to PNG or JPEG")
    return BadSample("no_picture", f"members {sorted(members)}")
