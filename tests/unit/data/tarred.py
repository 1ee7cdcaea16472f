"""Tars as strangers pack them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.unit.data.pictures import color_of, png

Member = tuple[str, bytes] | tuple[str, bytes, Callable[[tarfile.TarInfo], None]]


def pack(path: Path, members: Sequence[Member], form: int = tarfile.GNU_FORMAT, encoding: str = "utf-8") -> Path:
    """Write (name, bytes) or (name, bytes, change of its header) members in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form, encoding=encoding) as tar:
        for name, data, *change in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for one in change:
                one(info)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(numbers: Sequence[int]) -> list[Member]:
    """A picture and a text each."""
    found: list[Member] = []
    for i in numbers:
        found += [(f"{i:05d}.png", png(color_of(i))), (f"{i:05d}.txt", f"picture {i}".encode())]
    return found


def link(kind: bytes, target: str) -> Callable[[tarfile.TarInfo], None]:
    """Make a member a link."""

    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname, info.size = kind, target, 0

    return change
