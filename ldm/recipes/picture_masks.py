"""Masks of a masked loss: a picture's own transparency, or mask files beside it; white is what is learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ldm.data import decode
from ldm.data.bad import BadSample
from ldm.data.loader import DataConfig
from ldm.data.mixture import Data
from ldm.data.pairing import ALPHA, Listing, Search, beside, orphaned
from ldm.objectives.masked import MaskOptions

WHITE = "white"
"""All of a picture, as class pictures are learned."""


def check_masks(mask: MaskOptions | None, where: str | None, data: Data) -> None:
    """Raise ValueError where the masks of a masked loss do not reach it; `where` is what the task tells of them."""
    if mask is None:
        if where is not None:
            raise ValueError(f"task.masks: {where!r}, but the loss has no mask; write task.options.mask: {{}}")
        return
    if isinstance(data, DataConfig):
        parts = {"data": data}
    else:
        parts = {f"data.sources.{i}.data": s.data for i, s in enumerate(data.sources)}
    for place, source in parts.items():
        if mask.pair not in source.pairs:
            raise ValueError(
                f"{place}.pairs: no {mask.pair!r}, which task.options.mask needs; write {mask.pair}: "
                "{kind: stored, channels: 1}"
            )


class Masks:
    """Where the masks of a folder's pictures are.

    `where`: "alpha"; a folder that is there, with a file of each picture's name; or as `ldm data build --pair mask=`
    has it, a suffix (`-masklabel`, `_mask`) or the name of a folder beside the pictures (`masks/`). Raises ValueError
    for anything else.
    """

    def __init__(self, where: str, folder: Path) -> None:
        self.where, self._folder, self._listing = where, folder, Listing()
        self._apart = None if where in (ALPHA, WHITE) or not Path(where).is_dir() else Path(where)
        own = where in (ALPHA, WHITE) or self._apart is not None
        try:
            self._search = None if own else Search.of("mask", where)
        except ValueError:
            raise ValueError(self._told()) from None
        if self._search is not None and self._search.columns:
            raise ValueError(self._told())
        self._without = 0

    def _told(self) -> str:
        return (
            f"masks: {self.where!r}: expected alpha, a folder of masks, a suffix (_mask) or the name of a folder "
            "beside the pictures (masks/)"
        )

    def taken(self, path: Path | None) -> bool:
        """Whether a file is a mask, by its name or folder, and no picture."""
        if path is None:
            return False
        if self._apart is not None:
            return self._apart.resolve() in path.resolve().parents and self._apart.resolve() != self._folder.resolve()
        return self._search is not None and orphaned([self._search], path, self._folder) is not None

    def of(self, path: Path | None, data: Callable[[], bytes], size: tuple[int, int]) -> Image.Image:
        """The mask (L) of a picture of this (width, height). Raises BadSample for one that is damaged or of another
        shape, and ValueError for mask files of a data set, which has no files."""
        mask = None if self.where == WHITE else self._opacity(data) if self.where == ALPHA else self._file(path)
        if mask is None:
            self._without += self.where != WHITE
            return Image.new("L", size, 255)
        if mask.size == size:
            return mask
        if abs(mask.width * size[1] - mask.height * size[0]) > max(mask.size) * max(size) // 50:
            raise BadSample("mask", f"its mask is {mask.width}x{mask.height}, the picture {size[0]}x{size[1]}")
        return mask.resize(size, Image.Resampling.BILINEAR)

    def remarks(self, pictures: int) -> list[str]:
        """What is to be said. Raises ValueError where no picture has a mask."""
        if pictures and self._without >= pictures:
            what = "transparency" if self.where == ALPHA else f"a mask ({self.where})"
            raise ValueError(f"masks: {self.where!r}: none of the {pictures} pictures of {self._folder} has {what}")
        return [f"{self._without} pictures have no mask: all of them is learned"] if self._without else []

    @staticmethod
    def _opacity(data: Callable[[], bytes]) -> Image.Image | None:
        return decode.layers(data())[1]

    def _file(self, path: Path | None) -> Image.Image | None:
        if path is None:
            raise ValueError(
                f"masks: {self.where!r} is of a folder of pictures; a data set has its own, which data.pairs names"
            )
        if self._apart is not None:
            inner = path.parent.relative_to(self._folder) if self._folder in path.parents else Path()
            found = self._listing.find(self._apart / inner, path.stem) or self._listing.find(self._apart, path.stem)
        else:
            assert self._search is not None
            found = beside(self._search, path, self._folder, self._listing)
        if len(found) > 1:
            raise BadSample(
                "mask", f"{len(found)} files for its mask: {', '.join(p.name for p in found)}; one is wanted"
            )
        return decode.mask(found[0].read_bytes()) if found else None
