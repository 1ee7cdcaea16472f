"""Versions, CUDA builds and compute capabilities compared; pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

Number = tuple[int, ...]


def numbers(version: str | None) -> Number:
    """(2, 14, 1) of "2.14.1+cu130"; () of None."""
    found = re.match(r"\s*v?(\d+(?:\.\d+)*)", version or "")
    return tuple(int(n) for n in found[1].split(".")) if found else ()


def fits(version: str, wanted: str) -> bool:
    """Whether a version keeps all of ">=0.19.8,<0.20"; `!=` and `==` too."""
    have = numbers(version)
    for part in filter(None, wanted.split(",")):
        sign, bound = re.match(r"\s*([<>=!]=?)\s*(.*)", part).groups()  # type: ignore[union-attr]
        limit = numbers(bound)
        width = max(len(have), len(limit))
        a, b = (n + (0,) * (width - len(n)) for n in (have, limit))
        if not {">=": a >= b, "<": a < b, "<=": a <= b, ">": a > b, "==": a == b, "!=": a != b}[sign]:
            return False
    return True


def local(version: str | None) -> str:
    """ "cu130" of "2.14.1+cu130"; "" without."""
    return (version or "").partition("+")[2]


def encoded_cuda(number: int) -> Number:
    """(12, 4) of CUDA's own 12040."""
    return number // 1000, number % 1000 // 10


def covered(capability: Iterable[int], architectures: Iterable[str]) -> bool:
    """Whether a build for these ("sm_75", "sm_90a", "compute_120") runs on a card of a capability (major, minor).

    Machine code runs on later minors of its major; code of "compute_" is translated for all later cards.
    """
    major, minor = capability
    for name in architectures:
        kind, _, digits = name.partition("_")
        found = re.match(r"(\d+)(\d)([a-z]?)$", digits)
        if not found:
            continue
        a, b, own = int(found[1]), int(found[2]), found[3]
        if own and (a, b) == (major, minor):
            return True
        if not own and ((a == major and b <= minor) or (kind == "compute" and (a, b) <= (major, minor))):
            return True
    return False


def partner(torch: str) -> str:
    """The version of torchvision that was released with a torch: 0.29 for 2.14."""
    found = numbers(torch)
    if len(found) < 2 or found[0] != 2:
        return ""
    return f"0.{found[1] + 15}"
