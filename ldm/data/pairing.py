"""Finds the partners of pictures in the folders and tables people have: by suffix, in a folder beside, by column.

`photo.jpg` has `photo.condition.png` or `photo_condition.png` beside it, or `conditioning_images/photo.png`; a table
has a column `conditioning_image`. What has no partner, and a partner of nothing, is reported, never passed over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ldm.data.bad import BadSample
from ldm.data.formats import SUFFIXES, suffix
from ldm.data.items import Item, Partner
from ldm.data.listing import Embedded, column_of, composed, inside
from ldm.data.pairs import NAME

ALPHA = "alpha"
"""Of a pair's place: no file, but the picture's own opacity."""
COLUMNS: dict[str, tuple[str, ...]] = {
    "condition": ("conditioning_image", "condition", "condition_image", "control_image", "control", "source"),
    "original": ("original_image", "input_image", "source_image", "source_img", "original", "source"),
    "mask": ("mask", "mask_image", "mask_img"),
    "reference": ("reference", "reference_image"),
}
"""What published sets call the column of a partner: fill50k, ControlNet's prompt.json, InstructPix2Pix, MagicBrush."""

PICTURES = ("image", "edited_image", "target_image", "target_img", "target")
"""What they call the column of the picture itself where it is not file_name."""

_FOLDERS = {
    "condition": ("conditioning_images", "condition_images", "control_images", "conditioning", "control"),
    "original": ("original_images", "input_images", "source_images"),
    "mask": ("mask_images",),
    "reference": ("reference_images",),
}


@dataclass(frozen=True)
class Search:
    """Where partners of one name are looked for."""

    name: str
    suffixes: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    @staticmethod
    def of(name: str, where: str | None) -> Search:
        """By a suffix (begins with . _ or -), a folder (ends with /) or a column; None looks at all usual places."""
        if not NAME.fullmatch(name):
            raise ValueError(f"pair {name!r}: expected a name of small letters, digits and _, as in condition")
        if where is None:
            folders = (name, f"{name}s", *_FOLDERS.get(name, ()))
            return Search(name, (f".{name}", f"_{name}"), folders, COLUMNS.get(name, (name, f"{name}_image")))
        if where.endswith(("/", os.sep)) and where.strip("/"):
            return Search(name, folders=(where.rstrip("/"),))  # beside the pictures, or an absolute one
        if where[:1] in (".", "_", "-") and len(where) > 1:
            return Search(name, suffixes=(where,))
        if not where or "/" in where:
            raise ValueError(
                f"pair {name}={where}: expected a suffix (.{name}, _{name}), a folder (conditioning_images/) or the "
                "name of a column (conditioning_image)"
            )
        return Search(name, columns=(where,))

    @property
    def told(self) -> str:
        """For a sentence: the places."""
        parts = [", ".join(f"NAME{s}.*" for s in self.suffixes)]
        for what, names in (("folder", self.folders), ("column", self.columns)):
            parts.append(f"{what}{'s' if len(names) > 1 else ''} {', '.join(names)}" if names else "")
        return "; ".join(part for part in parts if part)


@dataclass
class Listing:
    """Pictures in folders by their stems, each folder looked at once."""

    _known: dict[Path, dict[str, list[Path]]] = field(default_factory=dict)

    def find(self, folder: Path, stem: str) -> list[Path]:
        """Pictures of a stem, whatever their suffix and letter case."""
        if folder not in self._known:
            found: dict[str, list[Path]] = {}
            for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
                if f".{suffix(name)}" in SUFFIXES:
                    found.setdefault(_plain(os.path.splitext(name)[0]), []).append(folder / name)
            self._known[folder] = found
        return self._known[folder].get(_plain(stem), [])


def _plain(name: str) -> str:
    return composed(name).casefold()


def in_row(
    searches: Sequence[Search], row: dict[str, Any], where: str, base: Path, embedded: Mapping[str, Embedded]
) -> dict[str, Partner]:
    """The partners that a row of a table names, whose columns are taken out of it. Raises BadSample."""
    found: dict[str, Partner] = {}
    for search in searches:
        column = next((c for name in search.columns if (c := column_of(name, row, embedded)) is not None), None)
        if column is None:
            continue
        value = row.pop(column, None)
        if column in embedded:
            found[search.name] = embedded[column]
        elif isinstance(value, str) and value:
            found[search.name] = inside(base, value, f"{where}: {column}")
        else:
            raise BadSample("no_partner", f"{where}: {column} is {value!r:.40}, no file's name")
    return found


def beside(search: Search, picture: Path, top: Path, listing: Listing) -> list[Path]:
    """The files that are a picture's partner by their names."""
    found = [p for s in search.suffixes for p in listing.find(picture.parent, picture.stem + s)]
    above = picture.parent
    while True:
        parts = picture.relative_to(above).parts
        for folder in search.folders:
            for rest in (parts, parts[1:]):
                if rest and above / folder not in picture.parents:
                    place = (above / folder).joinpath(*rest[:-1])
                    found += listing.find(place, picture.stem)
        if above == top or top not in above.parents:
            return [p for p in dict.fromkeys(found) if p != picture]
        above = above.parent


def orphaned(searches: Sequence[Search], picture: Path, top: Path) -> str | None:
    """The pair that a picture's name says it is a partner for."""
    inner = picture.relative_to(top).parts[:-1] if top in picture.parents else ()
    for search in searches:
        if any(_plain(picture.stem).endswith(_plain(s)) and len(picture.stem) > len(s) for s in search.suffixes):
            return search.name
        if not {_plain(f) for f in search.folders}.isdisjoint(_plain(part) for part in inner):
            return search.name
    return None


def paired(items: Sequence[Item], searches: Sequence[Search], top: Path) -> Iterator[Item]:
    """The items with their partners; files that are partners are no items of their own.

    An item without a partner, and a partner without a picture, get the problem no_partner.
    """
    listing, taken, out = Listing(), set[Path](), []
    for item in items:
        if item.problem is None and (item.partners or item.held or orphaned(searches, item.path, top) is None):
            item, found = _with_partners(item, searches, top, listing)
            taken |= found
        out.append(item)
    for item in out:
        if item.held is None and item.path in taken:
            continue
        if item.problem is None and not item.partners:
            name = orphaned(searches, item.path, top)
            item = replace(item, problem=("no_partner", f"a {name} by its name, of no picture"))
        yield item


def _with_partners(item: Item, searches: Sequence[Search], top: Path, listing: Listing) -> tuple[Item, set[Path]]:
    """The item with all its partners, or with what is wrong, and the files that are partners."""
    own = dict(item.partners)
    taken = {p for p in own.values() if isinstance(p, Path)}
    problem = None
    for search in searches:
        if search.name in own:
            continue
        found = [] if item.held is not None else beside(search, item.path, top, listing)
        taken |= set(found)
        if len(found) == 1:
            own[search.name] = found[0]
        elif problem is None:
            told = f"no {search.name}; looked for {search.told}"
            if found:
                told = f"{len(found)} files for {search.name}: {', '.join(p.name for p in found)}; one is wanted"
            problem = ("no_partner", told)
    return replace(item, partners=own, problem=problem), taken
