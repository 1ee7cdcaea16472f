"""Partners that are stored beside a sample's picture: decoded, checked against it, fitted as it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.data import decode, images
from ldm.data.bad import BadSample
from ldm.data.formats import IMAGES
from ldm.data.pairs import Pair, Stored, StoredMask

MASK = "mask"
"""The member of a sample that holds its mask."""


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
                values = binary(np.asarray(decode.mask(data)))
                own = (values.shape[1], values.shape[0])
            else:
                # A reduced decoding would mix the values of classes.
                values, own = decode.upright(data, at_least=size if pair.filter == "bicubic" else None)
        except BadSample as error:
            raise BadSample(error.reason, f"{member}: {error.detail}") from error
        check_aspect(member, own, whole)
        if mask:
            check_mask(member, values)
        elif pair.channels == 1:
            values = np.asarray(Image.fromarray(values).convert("L"))
        values = values if values.ndim == 3 else values[:, :, None]
        nearest = mask or pair.filter == "nearest"
        found[name] = images.fit_partner(values, decoded, size, fit, nearest=nearest, ground=0 if mask else 255)
    return found


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
