"""Plain JPEGs by the fastest decoder at hand, to the same pixels whichever it is.

simplejpeg, torchvision and PIL all run libjpeg-turbo with its exact transform. What is not a plain picture (CMYK,
turned by EXIF, of another colour profile, damaged) is left to PIL's slower path.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.data import colour

Decoder = Literal["simplejpeg", "torchvision", "pil"]
Decode = Callable[[bytes, "Header", int], NDArray[np.uint8]]
_SCALES = (8, 4, 2, 1)
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_START, _SCAN, _APP1, _APP2, _APP14 = b"\xff\xd8", 0xDA, 0xE1, 0xE2, 0xEE
_ORIENTATION = 0x0112
_XMP, _ICC = b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0"
_XMP_TURNED = re.compile(rb"tiff:Orientation(=\"|>)[02-9]")


@dataclass(frozen=True)
class Header:
    """Pixels of a plain upright YCbCr picture."""

    width: int
    height: int

    def scaled(self, scale: int) -> tuple[int, int]:
        """(height, width) when decoded at 1/scale."""
        return -(-self.height // scale), -(-self.width // scale)


def header(data: bytes) -> Header | None:
    """The header of a plain picture; None for any other bytes."""
    profile = b""
    try:
        for marker, body in _segments(data):
            if marker == _APP1 and body[:6] == b"Exif\0\0":
                exif = Image.Exif()
                exif.load(body)
                if exif.get(_ORIENTATION, 1) != 1:
                    return None
            elif marker == _APP1 and body.startswith(_XMP) and _XMP_TURNED.search(body):
                return None
            elif marker == _APP2 and body.startswith(_ICC):
                profile += body[len(_ICC) + 2 :]
            elif marker == _APP14 and body[:5] == b"Adobe" and body[11] != 1:
                return None
            elif marker in _FRAMES:
                precision, height, width, components = struct.unpack_from(">BHHB", body)
                plain = precision == 8 and components == 3 and body[6::3] != b"RGB"
                plain = plain and (not profile or colour.is_srgb(profile))
                return Header(width, height) if plain and width and height else None
            elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                return None
    except (struct.error, IndexError, SyntaxError, ValueError, OSError):
        return None
    return None


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, body) up to the first scan."""
    place = 2
    if data[:2] != _START:
        return
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # filling
            place += 1
            continue
        if marker == _SCAN:
            return
        (length,) = struct.unpack_from(">H", data, place + 2)
        yield marker, data[place + 4 : place + 2 + length]
        place += 2 + length


def scale_for(found: Header, at_least: tuple[int, int] | None) -> int:
    """The largest reduction while decoding that still covers (width, height)."""
    if at_least is None:
        return 1
    room = min(found.width // at_least[0], found.height // at_least[1])
    return next((s for s in _SCALES if room >= s), 1)


def pixels(data: bytes, found: Header, scale: int = 1, decoder: Decoder | None = None) -> NDArray[np.uint8] | None:
    """(H, W, 3) uint8 at 1/scale; None if the decoder finds fault with it, for PIL to say what."""
    try:
        decoded = _DECODERS[decoder](data, found, scale) if decoder else best(scale)(data, found, scale)
    except (ValueError, RuntimeError, OSError, SyntaxError):
        return None
    return decoded if decoded.shape == (*found.scaled(scale), 3) else None


def best(scale: int) -> Decode:
    """The fastest decoder that is installed; torchvision's does not reduce."""
    return _DECODERS[fastest() if scale == 1 or fastest() == "simplejpeg" else "pil"]


@cache
def fastest() -> Decoder:
    """The first of simplejpeg, torchvision and PIL that works here."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 99, 200)).save(buffer, "JPEG")
    small = buffer.getvalue(), Header(8, 8), 1
    found: tuple[Decoder, ...] = ("simplejpeg", "torchvision")
    for name in found:
        try:
            if np.array_equal(_DECODERS[name](*small), _pil(*small)):
                return name
        except (ImportError, RuntimeError, OSError):  # not installed, or its library does not load
            continue
    return "pil"


def _simplejpeg(data: bytes, found: Header, scale: int) -> NDArray[np.uint8]:
    import simplejpeg  # pyright: ignore[reportMissingImports]

    height, width = found.scaled(scale) if scale > 1 else (0, 0)
    return simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)


def _torchvision(data: bytes, found: Header, scale: int) -> NDArray[np.uint8]:
    import torch
    from torchvision.io import decode_jpeg

    planes = decode_jpeg(torch.from_numpy(np.frombuffer(bytearray(data), np.uint8)))
    assert isinstance(planes, torch.Tensor)
    return planes.permute(1, 2, 0).numpy()


def _pil(data: bytes, found: Header, scale: int) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        if scale > 1:
            image.draft("RGB", (found.width // scale, found.height // scale))
        return np.asarray(image.convert("RGB"))


_DECODERS: dict[str, Decode] = {"simplejpeg": _simplejpeg, "torchvision": _torchvision, "pil": _pil}
