"""Finds pictures and their captions in the folders people have: `.txt` beside each, HF metadata, kohya's layout."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ldm.data.decode import BadSample, text

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv")
CaptionsFrom = Literal["files", "folder", "name"]

_KOHYA = re.compile(r"(\d+)_(.+)")


@dataclass(frozen=True)
class Item:
    """A picture to read. `problem` is set instead when the source itself says nothing usable about it."""

    key: str
    name: str
    path: Path
    captions: tuple[tuple[str, float], ...] = ()
    caption_file: Path | None = None
    repeats: int = 1
    extra: dict[str, Any] = field(default_factory=dict)
    problem: tuple[str, str] | None = None


def find(source: Path, captions_from: CaptionsFrom = "files") -> list[Item]:
    """The items of a folder, or of a metadata.jsonl or .csv, sorted by name; keys are unique and hold no dot.

    A folder named `NN_token` is kohya's: its pictures have NN repeats, and the token is the caption of those without
    one. Pictures in a folder that its metadata does not name are given without captions, so that they get reported.
    Raises ValueError if there is no picture.
    """
    if not source.exists():
        raise ValueError(f"source {str(source)!r}: no such folder or metadata file")
    if source.is_file():
        if source.suffix not in (".jsonl", ".csv"):
            raise ValueError(f"source {str(source)!r}: expected a folder, a metadata.jsonl or a metadata.csv")
        items = list(_metadata(source))
    else:
        items = []
        named: set[Path] = set()
        for name in METADATA:
            if (source / name).is_file():
                items += _metadata(source / name)
                named = {item.path for item in items}
        items += [i for i in _folder(source, captions_from) if i.path not in named]
    if not items:
        raise ValueError(f"source {str(source)!r}: no pictures found; looked for {sorted(SUFFIXES)}")
    return _unique(sorted(items, key=lambda item: item.name))


def captions_beside(item: Item) -> list[tuple[str, float]]:
    """The item's captions; its caption file has one a line. BadSample if the file is not UTF-8."""
    if item.caption_file is None:
        return list(item.captions)
    lines = text(item.caption_file.read_bytes()).splitlines()
    found = [(line.strip(), 1.0) for line in lines if line.strip()]
    return found or list(item.captions)


def _folder(source: Path, captions_from: CaptionsFrom) -> Iterator[Item]:
    for folder, folders, files in os.walk(source, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        here = Path(folder)
        present = set(files)
        kohya = _KOHYA.fullmatch(here.name) if captions_from == "files" else None
        for file in sorted(files):
            path = here / file
            if path.suffix.lower() not in SUFFIXES or file.startswith("."):
                continue
            beside = next((here / (path.stem + s) for s in CAPTION_SUFFIXES if path.stem + s in present), None)
            fallback: tuple[tuple[str, float], ...] = ()
            if kohya:
                fallback = ((kohya.group(2).replace("_", " ").strip(), 1.0),)
            elif captions_from != "files":
                raw = here.name if captions_from == "folder" else path.stem
                fallback, beside = ((re.sub(r"[_\-\s]+", " ", raw).strip(), 1.0),), None
            name = path.relative_to(source).as_posix()
            repeats = int(kohya.group(1)) if kohya else 1
            yield Item(_key(name), name, path, fallback, beside, max(repeats, 1))


def _metadata(path: Path) -> Iterator[Item]:
    base = path.parent.resolve()
    for number, row in enumerate(_rows(path), 1):
        where = f"{path.name}:{number}"
        if isinstance(row, str):
            yield Item(_key(f"line-{number}"), where, path, problem=("bad_metadata", row))
            continue
        row = dict(row)
        name = row.pop("file_name", None)
        if not isinstance(name, str) or not name:
            yield Item(_key(f"line-{number}"), where, path, problem=("bad_metadata", f"{where}: no file_name"))
            continue
        target = path.parent / name
        captions = _captions(row)
        if not target.resolve().is_relative_to(base):
            yield Item(_key(name), name, target, problem=("outside", f"{where}: {name!r} leaves the folder"))
        elif not target.is_file():
            yield Item(_key(name), name, target, problem=("missing", f"{where}: no such file"))
        else:
            beside = next((s for c in CAPTION_SUFFIXES if (s := target.with_suffix(c)).is_file()), None)
            yield Item(_key(name), name, target, captions, None if captions else beside, 1, row)


def _rows(path: Path) -> Iterator[dict[str, Any] | str]:
    """Rows, or what is wrong with one."""
    with path.open("rb") as file:
        if path.suffix == ".csv":
            try:
                yield from csv.DictReader(text(file.read()).splitlines())
            except BadSample as error:
                yield f"{path.name}: {error}"
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                yield f"{path.name}:{number}: {error}"
                continue
            yield row if isinstance(row, dict) else f"{path.name}:{number}: expected keys and values"


def _captions(row: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    for name in ("captions", "text", "caption", "prompt"):
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            del row[name]
            return ((value.strip(), 1.0),)
        if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
            del row[name]
            return tuple((v.strip(), 1.0) for v in value if v.strip())
    return ()


def _key(name: str) -> str:
    stem = name.rsplit(".", 1)[0] if "." in os.path.basename(name) else name
    return re.sub(r"[.\s\\]+", "_", stem.strip("/")) or "_"


def _unique(items: list[Item]) -> list[Item]:
    seen: dict[str, int] = {}
    taken = {item.key for item in items}
    result = []
    for item in items:
        count = seen[item.key] = seen.get(item.key, 0) + 1
        key = item.key
        while count > 1 and key in taken:
            key = f"{item.key}-{count}"
            count += 1
        taken.add(key)
        result.append(item if key == item.key else Item(key, *list(vars(item).values())[1:]))
    return result
