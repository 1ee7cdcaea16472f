"""Captions of a folder of pictures, read and changed in place, and what training would find wrong with the folder."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.data import decode
from ldm.data.bad import BadSample
from ldm.data.buckets import BucketConfig, assign
from ldm.data.formats import suffix
from ldm.data.inspection import difference_hash, look_alikes
from ldm.data.items import Item
from ldm.data.sources import CAPTION_FIELDS, CAPTION_SUFFIXES, METADATA, captions_beside, find, read

SIDES = (64, 128, 256, 512, 768, 1024)
"""Sides in pixels that models are trained at."""


@dataclass(frozen=True)
class Shown:
    """A picture of a folder by its name there, with its captions; `problem` says why it cannot be used."""

    name: str
    path: Path
    captions: tuple[str, ...]
    problem: str = ""


@dataclass(frozen=True)
class Checked:
    """What training at `side` would find: names, or groups of names."""

    side: int
    pictures: int
    bad: dict[str, str]
    uncaptioned: list[str]
    small: dict[str, tuple[int, int]]
    alike: list[list[str]]
    buckets: dict[str, int]


def listed(folder: Path) -> list[Shown]:
    """The pictures of a folder in the order of their names. Raises ValueError where there is no folder or picture."""
    return [_shown(item) for item in _items(folder)]


def _items(folder: Path) -> list[Item]:
    if not folder.is_dir():
        raise ValueError(f"folder {str(folder)!r}: no such folder")
    return find(folder)


def _shown(item: Item) -> Shown:
    try:
        return Shown(item.name, item.path, tuple(text for text, _ in captions_beside(item)))
    except BadSample as error:
        return Shown(item.name, item.path, (), error.detail)


def check(folder: Path, side: int | None = None, progress: Callable[[int, int], None] | None = None) -> Checked:
    """Read all pictures; `side` None: the largest of `SIDES` that half of them have. Raises ValueError as `listed`."""
    items = _items(folder)
    if side is not None and side < 8:
        raise ValueError(f"size: must be at least 8 pixels, got {side}")
    bad: dict[str, str] = {}
    uncaptioned: list[str] = []
    sizes: dict[str, tuple[int, int]] = {}
    hashes: dict[int, list[str]] = defaultdict(list)
    for k, item in enumerate(items):
        try:
            if not captions_beside(item):
                uncaptioned.append(item.name)
            picture = decode.picture(read(item))
            sizes[item.name] = picture.size
            hashes[difference_hash(picture)].append(item.name)
        except BadSample as error:
            bad[item.name] = error.detail
        if progress is not None:
            progress(k + 1, len(items))
    if side is None:
        half = statistics.median_low([min(size) for size in sizes.values()] or [SIDES[0]])
        side = max((s for s in SIDES if s <= half), default=SIDES[0])
    step = 64 if side % 64 == 0 and side >= 256 else 8
    buckets = assign(sizes, BucketConfig(size=max(step, side // step * step), step=step, least=1)) if sizes else None
    return Checked(
        side=side,
        pictures=len(items),
        bad=bad,
        uncaptioned=uncaptioned,
        small={name: size for name, size in sizes.items() if min(size) < side},
        alike=[sorted(group) for group in look_alikes(hashes) if len(group) > 1],
        buckets={} if buckets is None else {k: int(str(v["pictures"])) for k, v in buckets.report().items()},
    )


def with_trigger(caption: str, word: str) -> str:
    """The caption behind a trigger word and a comma, unless it begins with the word already."""
    begins = re.match(rf"{re.escape(word)}(?!\w)", caption)
    return caption if begins else f"{word}, {caption}" if caption else word


def edit(
    folder: Path,
    *,
    texts: Mapping[str, str] | None = None,
    trigger: str | None = None,
    replace: tuple[str, str] | None = None,
) -> list[str]:
    """Change captions: `texts` by picture (one a line), then find and replace, then a trigger word to all.

    Captions go where they were: into the file beside the picture (a new .txt where there is none) or the row of a
    metadata.jsonl. The names of pictures that changed. Raises ValueError, before anything is written, for a name that
    is not there, an empty word, and captions in files that are not written here.
    """
    items = {item.name: item for item in _items(folder)}
    for name in texts or {}:
        if name not in items:
            raise ValueError(f"picture {name!r}: not in {str(folder)!r}")
    word = None if trigger is None else " ".join(trigger.split())
    if word == "":
        raise ValueError("trigger: it is empty; give a word, such as sks")
    if replace is not None and not replace[0]:
        raise ValueError("replace: what to find is empty")
    new: dict[str, list[str]] = {}
    for name, item in items.items():
        shown = _shown(item)
        if shown.problem:
            continue
        captions = list(shown.captions)
        if texts and name in texts:
            captions = [line for line in (" ".join(line.split()) for line in texts[name].splitlines()) if line]
        if replace is not None:
            captions = [c for c in (" ".join(c.replace(*replace).split()) for c in captions) if c]
        if word is not None:
            captions = [with_trigger(c, word) for c in captions or [""]]
        if captions != list(shown.captions):
            new[name] = captions
    _write(folder, [(items[name], captions) for name, captions in new.items()])
    return sorted(new)


def _write(folder: Path, changed: Sequence[tuple[Item, Sequence[str]]]) -> None:
    files: dict[Path, str] = {}
    tables: dict[Path, dict[Path, Sequence[str]]] = defaultdict(dict)
    for item, captions in changed:
        beside = item.caption_file
        if beside is None and item.captions and (table := _table(item, folder)) is not None:
            if table.suffix.lower() != ".jsonl" or item.held is not None:
                raise ValueError(
                    f"{item.name}: its caption is in {table.name}, which is not written here; edit it there"
                )
            tables[table][item.path] = captions
            continue
        if beside is not None and suffix(beside.name) not in CAPTION_SUFFIXES:
            raise ValueError(f"{item.name}: its caption is in {beside.name}, which is not written here; edit it there")
        files[beside or item.path.with_suffix(".txt")] = "".join(f"{line}\n" for line in captions)
    texts = {table: _rows(table, rows) for table, rows in tables.items()}
    for path, text in {**files, **texts}.items():
        part = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)


def _table(item: Item, folder: Path) -> Path | None:
    """The metadata table that holds a picture's captions: the nearest upwards."""
    place = item.path.parent
    while True:
        named = {file.name.lower(): file for file in place.iterdir()}
        found = next((named[name] for name in METADATA if name in named), None)
        if found is not None or place in (folder, place.parent):
            return found
        place = place.parent


def _rows(table: Path, changed: Mapping[Path, Sequence[str]]) -> str:
    """The table's text with other captions in the rows of some pictures."""
    lines = []
    for line in table.read_text(encoding="utf-8-sig").splitlines():
        row: Any = json.loads(line) if line.strip() else None
        if isinstance(row, dict) and (captions := changed.get(table.parent / str(row.get("file_name")))) is not None:
            field = next(name for name in CAPTION_FIELDS if row.get(name))
            several = isinstance(row[field], list)
            if len(captions) > 1 and not several:
                raise ValueError(f"{row['file_name']}: {table.name} holds one caption of it, got {len(captions)} lines")
            row[field] = list(captions) if several else "".join(captions)
            line = json.dumps(row, ensure_ascii=False)
        lines.append(line + "\n")
    return "".join(lines)
