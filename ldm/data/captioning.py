"""Captions of a folder of pictures, read and changed in place, and what training would find wrong with the folder."""

from __future__ import annotations

import os
import re
import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.data import decode, rewriting
from ldm.data.bad import BadSample
from ldm.data.buckets import BucketConfig, assign
from ldm.data.formats import suffix
from ldm.data.inspection import difference_hash, look_alikes
from ldm.data.items import Item
from ldm.data.sources import CAPTION_FIELDS, captions_beside, find, read
from ldm.data.texts import check as check_text

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

    Captions go where they were: into the file beside the picture (a new .txt where there is none), or into their place
    in a metadata table or the picture's JSON, of which nothing else changes. The names of pictures that changed. Raises
    ValueError, before anything is written, for a name that is not there, an empty word, and captions in files that are
    not written here.
    """
    items = _items(folder)
    missing = set(texts or {}) - {item.name for item in items}
    if missing:
        raise ValueError(f"picture {min(missing)!r}: not in {str(folder)!r}")
    word = None if trigger is None else " ".join(trigger.split())
    if word == "":
        raise ValueError("trigger: it is empty; give a word, such as sks")
    if replace is not None and not replace[0]:
        raise ValueError("replace: what to find is empty")
    changed: list[tuple[Item, list[str]]] = []
    for item in items:
        shown = _shown(item)
        if shown.problem:
            continue
        captions = list(shown.captions)
        if texts and item.name in texts:
            captions = [line for line in (" ".join(line.split()) for line in texts[item.name].splitlines()) if line]
        if replace is not None:
            captions = [c for c in (" ".join(c.replace(*replace).split()) for c in captions) if c]
        if word is not None:
            captions = [with_trigger(c, word) for c in captions or [""]]
        if captions != list(shown.captions):
            changed.append((item, captions))
    for item, captions in changed:
        for caption in captions:
            _check_text(item.name, caption)
    _write(changed)
    return sorted({item.name for item, _ in changed})


def _check_text(name: str, caption: str) -> None:
    try:
        check_text(caption)
    except BadSample as error:
        raise ValueError(f"{name}: caption {caption!r}: {error.detail}") from error


def _write(changed: Sequence[tuple[Item, Sequence[str]]]) -> None:
    files: dict[Path, bytes] = {}
    tables: dict[Path, dict[int, tuple[str, Sequence[str]]]] = defaultdict(dict)
    for item, captions in changed:
        beside, cell = item.caption_file, item.cell
        if (beside is None and cell is not None) or item.held is not None:
            table = item.path if cell is None else cell.table
            if suffix(table.name) not in rewriting.WRITTEN or cell is None:
                raise ValueError(f"{item.name}: its caption belongs into {table.name}, which is not written here; "
                                 f"save the table as metadata.jsonl or metadata.csv")  # fmt: skip
            tables[table][cell.row] = (cell.column, captions)
        elif beside is not None and suffix(beside.name) == "json":
            files[beside] = rewriting.json_with(beside, captions, CAPTION_FIELDS)
        else:
            files[beside or item.path.with_suffix(".txt")] = "".join(f"{line}\n" for line in captions).encode()
    new = files | {table: rewriting.table_with(table, rows) for table, rows in tables.items()}
    # a link's target is written, not the link; the part keeps the suffix, by which a table is read
    parts = {(target := path.resolve()).with_name(f".tmp-{os.getpid()}-{target.name}"): target for path in new}
    try:
        for (part, target), data in zip(parts.items(), new.values(), strict=True):
            part.write_bytes(data)
            if target.exists():
                shutil.copymode(target, part)
        for (part, _), path in zip(parts.items(), new, strict=True):
            if path in tables:
                rewriting.check_kept(path, part, tables[path])
        for part, target in parts.items():
            os.replace(part, target)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
