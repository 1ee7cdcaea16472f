"""Folders of small pictures for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def folder(at: Path, count: int, *, captions: bool = True, suffix: str = ".txt") -> Path:
    """A folder of so many pictures, each with a caption beside it or none."""
    at.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (16, 12), (i, 80, 160)).save(at / f"{i}.png")
        if captions:
            (at / f"{i}{suffix}").write_text(f"first, second, number {i}")
    return at
