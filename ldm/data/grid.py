"""Contact sheets: many pictures in one PNG."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor

from ldm.data.images import to_uint8


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1], clipped -> pictures."""
    return [Image.fromarray(row) for row in to_uint8(images)]


def sheet(pictures: list[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Pictures of one size in rows of `columns` on white."""
    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    columns = min(columns, len(pictures))
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    ground = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        ground.paste(picture, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return ground


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write (B, 3, H, W) in [-1, 1] as one picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(to_pil(images), columns).save(path)
