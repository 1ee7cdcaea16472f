"""Partners that are stored beside a sample's picture: decoded, checked against it, fitted as it was."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from ldm.data import decode, images
from ldm.data.bad import BadSample
from ldm.data.formats import IMAGES
from ldm.data.pairs import Pair, Stored, StoredMask

MASK = "mask"
"""The member of a sample that holds its mask."""
_EXTENSION = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_COLOUR = 8.0
"""Levels between a mask's channels on average, from which on it is in colour; JPEGs of grey have under one."""


def member_of(name: str, pair: Stored | StoredMask) -> str:
    """What a stored pair's member is called, without its suffix."""
    return (pair.member or name) if isinstance(pair, Stored) else pair.member


def stored(pairs: Mapping[str, Pair]) -> dict[str, Stored | StoredMask]:
    """The pairs that samples must have members of."""
    return {name: pair for name, pair in pairs.items() if isinstance(pair, Stored | StoredMask)}


def extensions(pairs: Mapping[str, Pair]) -> tuple[str, ...]:
    """The members that may hold them: condition.webp, condition.jpg, ..."""
    names = dict.fromkeys(member_of(name, pair) for name, pair in stored(pairs).items())
    return tuple(f"{name}.{suffix}" for name in names for suffix in IMAGES)


def partners_in(members: Iterable[str]) -> dict[str, str]:
    """The members that are partners, by name: {"condition": "condition.png"}."""
    found: dict[str, str] = {}
    for member in sorted(members):
        name, _, suffix = member.rpartition(".")
        if name and suffix in IMAGES:
            found.setdefault(name, member)
    return found


def is_mask(name: str) -> bool:
    """Whether a member is treated as a mask by its name: mask, or what ends with _mask."""
    return name == MASK or name.endswith(f"_{MASK}")


def partner_bytes(member: str, members: Mapping[str, bytes]) -> tuple[str, bytes]:
    """A partner's member and its bytes. Raises BadSample no_partner."""
    for suffix in IMAGES:
        if (data := members.get(f"{member}.{suffix}")) is not None:
            return f"{member}.{suffix}", data
    raise BadSample("no_partner", f"no member {member}.png, or of another picture's suffix; has {sorted(members)}")


def fitted(
    pairs: Mapping[str, Pair],
    members: Mapping[str, bytes],
    whole: tuple[int, int],
    decoded: tuple[int, int],
    size: tuple[int, int],
    fit: images.Fit,
) -> dict[str, NDArray[np.uint8]]:
    """The stored partners (H', W', C) of a picture, (width, height) `whole` in its file and `decoded` now.

    Raises BadSample no_partner, partner_size, flat_mask, or what is wrong with a partner's file.
    """
    found: dict[str, NDArray[np.uint8]] = {}
    for name, pair in stored(pairs).items():
        member, data = partner_bytes(member_of(name, pair), members)
        mask = isinstance(pair, StoredMask)
        try:
            if mask:
                values = mask_values(data, member)
                own = (values.shape[1], values.shape[0])
            else:
                # A reduced decoding would mix the values of classes.
                values, own = decode.upright(data, at_least=size if pair.filter == "bicubic" else None)
        except BadSample as error:
            raise _of(member, error) from error
        check_aspect(member, own, whole)
        if mask:
            check_mask(member, values)
        elif pair.channels == 1:
            values = np.asarray(Image.fromarray(values).convert("L"))
        values = values if values.ndim == 3 else values[:, :, None]
        nearest = mask or pair.filter == "nearest"
        found[name] = images.fit_partner(values, decoded, size, fit, nearest=nearest, ground=0 if mask else 255)
    return found


def _of(member: str, error: BadSample) -> BadSample:
    """The same with the member's name."""
    told = error.detail if error.detail.startswith(member) else f"{member}: {error.detail}"
    return BadSample(error.reason, told)


def mask_values(data: bytes, member: str, *, transparent: bool = False) -> NDArray[np.uint8]:
    """A mask (H, W) uint8, 255 where it is to be painted: white, or `transparent` where that marks it.

    Raises BadSample no_mask for a picture in colour: its brightness would be taken for one.
    """
    colours, opacity = decode.layers(data)
    if transparent:
        if opacity is None:
            raise BadSample("no_mask", f"{member} has no transparency, which shall mark what is to be painted")
        return binary(255 - np.asarray(opacity))
    values = np.asarray(colours).astype(np.int16)
    if (values.max(2) - values.min(2)).mean() > _COLOUR:
        hint = "; it is transparent in part: `ldm data build --masks transparent` takes that" if opacity else ""
        raise BadSample("no_mask", f"{member} is a picture in colour, no mask{hint}")
    bright = colours.convert("L")
    return binary(np.asarray(bright if opacity is None else ImageChops.multiply(bright, opacity)))


def binary(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """255 where a mask is at least 128, else 0."""
    return np.where(mask >= 128, 255, 0).astype(np.uint8)


def check_aspect(member: str, own: tuple[int, int], whole: tuple[int, int]) -> None:
    """BadSample unless a partner is its picture (width, height) at another scale, up to a pixel's rounding."""
    if abs(own[0] * whole[1] - own[1] * whole[0]) > max(*own, *whole):
        told = f"{member} is {own[0]}x{own[1]}, its picture {whole[0]}x{whole[1]}"
        raise BadSample("partner_size", f"{told}; both must show the same part, at any scale")


def check_mask(member: str, mask: NDArray[np.uint8]) -> None:
    """BadSample for a mask that paints nothing or everything."""
    if mask.min() == mask.max():
        what = "white: all would be painted" if mask.max() else "black: nothing would be painted"
        raise BadSample("flat_mask", f"{member} is all {what}")


def packed(
    name: str,
    data: bytes,
    whole: tuple[int, int],
    size: tuple[int, int],
    target: tuple[int, int] | None,
    transparent: bool,
    *,
    max_pixels: int,
) -> dict[str, bytes]:
    """The member of a partner, fit for a picture of (width, height) `whole` that is stored at `size`.

    A file keeps its bytes unless its picture was shrunk for a `target` and it is larger than that; what is shrunk, and
    masks, become PNG. Raises BadSample.
    """
    mask = is_mask(name)
    try:
        if mask:
            image, kind = Image.fromarray(mask_values(data, name, transparent=transparent)), None
        else:
            found = decode.decoded(data, max_pixels=max_pixels)
            image, kind = found.image, _EXTENSION.get(found.format) if found.plain else None
    except BadSample as error:
        raise _of(name, error) from error
    check_aspect(name, image.size, whole)
    if mask:
        check_mask(name, np.asarray(image))
    if target is not None and (image.width > size[0] or image.height > size[1]):
        values = np.asarray(image)
        values = values if values.ndim == 3 else values[:, :, None]
        values = images.fit_partner(values, whole, target, "crop", nearest=mask)
        image, kind = Image.fromarray(np.ascontiguousarray(values[:, :, 0] if mask else values)), None
    if kind is not None:
        return {f"{name}.{kind}": data}
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {f"{name}.png": buffer.getvalue()}
