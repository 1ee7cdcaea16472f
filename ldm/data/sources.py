"""Finds pictures and their captions in the folders people have: `.txt` beside each, HF metadata, kohya's layout."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ldm.data.bad import BadSample
from ldm.data.formats import SUFFIXES, UNREAD, may_be_misnamed, misnamed, passed_over, suffix
from ldm.data.items import Cell, Item, Partner
from ldm.data.listing import FILE, Embedded, Row, composed, inside, is_table, table_rows
from ldm.data.pairing import PICTURES, Search, in_row, paired
from ldm.data.texts import captions_in, json_of, lines, text

CAPTION_SUFFIXES = ("txt", "caption")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet")
PAIRED = "prompt.json"
"""The table of ControlNet's authors (fill50k): source, target, prompt; read where pairs are built."""
CAPTION_FIELDS = ("captions", "text", "caption", "prompt")
INSTRUCTION_FIELDS = ("edit_prompt", "instruction")
"""What sets of edits call the text, InstructPix2Pix's and MagicBrush; looked at where pairs are built."""
CaptionsFrom = Literal["files", "folder", "name", "none"]

_KOHYA = re.compile(r"([+-]?\d+)_(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of tables are what, and where partners are looked for; unset ones have their usual names."""

    pairs: tuple[Search, ...] = ()
    image: str | None = None
    caption: str | None = None

    @property
    def captions(self) -> tuple[str, ...]:
        """The columns that may hold captions."""
        if self.caption is not None:
            return (self.caption,)
        return (*CAPTION_FIELDS, *INSTRUCTION_FIELDS) if self.pairs else CAPTION_FIELDS

    @property
    def images(self) -> tuple[str, ...]:
        """The columns that may hold the picture."""
        if self.image is not None:
            return (self.image,)
        return (FILE, *PICTURES) if self.pairs else ()


def find(source: Path, captions_from: CaptionsFrom = "files", columns: Columns | None = None) -> list[Item]:
    """The items of a folder, or of a metadata table, sorted by name; keys are unique and hold no dot.

    This is the one place that says which files of a folder are samples, and how often each comes. A folder named
    `NN_words` is kohya's: its pictures have NN repeats, and the words are the caption of those without one. Pictures
    that no metadata names are given without captions, so that they get reported; pictures of formats that are not
    read are given with their problem. With captions from "none" no text is opened. Raises ValueError if there is no
    picture.
    """
    if not source.exists():
        raise ValueError(f"source {str(source)!r}: no such folder or metadata file")
    columns = columns or Columns()
    items = candidates(source, captions_from, columns)
    if columns.pairs:
        items = list(paired(items, columns.pairs, source.parent if source.is_file() else source))
    if not items:
        built = "; it holds a built data set" if (source / "manifest.json").is_file() else ""
        raise ValueError(f"source {str(source)!r}: no pictures found; looked for {sorted(SUFFIXES)}{built}")
    return items


def candidates(source: Path, captions_from: CaptionsFrom = "files", columns: Columns | None = None) -> list[Item]:
    """`find`, which may be nothing; without the partners that files' names tell."""
    columns = columns or Columns()
    if source.is_file():
        if not is_table(source):
            raise ValueError(
                f"source {str(source)!r}: expected a folder, or a metadata.jsonl, .csv, .tsv, .json or .parquet"
            )
        return _unique(list(_listed(source, _Folder(source.parent), captions_from, columns)))
    items: list[Item] = []

    def closed(error: OSError) -> None:
        path = Path(error.filename)
        name = path.relative_to(source).as_posix()
        items.append(Item(_key(name), _printable(name), path, problem=("unreadable", f"folder: {error.strerror}")))

    folders = list(_walk(source, closed))
    named: set[Path] = set()
    if captions_from != "none":
        for folder in reversed(folders):  # the metadata nearest to a picture is its own
            for table in folder.tables(paired=bool(columns.pairs)):
                found = list(_listed(table, folder, captions_from, columns, source))
                items += [i for i in found if i.path == table or i.path not in named]
                named |= {i.path for i in found}
    for folder in folders:
        items += [i for i in _pictures(folder, source, captions_from) if i.path not in named]
    return _unique(items)


def read(item: Item) -> bytes:
    """The bytes of the item's picture. Raises BadSample for its own problem, or where they cannot be had."""
    if item.problem is not None:
        raise BadSample(*item.problem)
    return read_place(item.held or item.path)


def read_place(place: Partner) -> bytes:
    """The bytes of a picture in a file or a table. Raises BadSample where they cannot be had."""
    if isinstance(place, Embedded):
        return place.read()
    try:
        if place.exists() and not place.is_file():
            raise BadSample("unreadable", "no regular file")
        return place.read_bytes()
    except OSError as error:
        raise BadSample("unreadable", str(error.strerror)) from error


def captions_beside(item: Item) -> list[tuple[str, float]]:
    """The item's captions; its caption file has one a line.

    Raises BadSample for the item's own problem, or for a file that is no text or cannot be opened.
    """
    if item.problem is not None:
        raise BadSample(*item.problem)
    if item.caption_file is None:
        return list(item.captions)
    name = item.caption_file.name
    try:
        data = item.caption_file.read_bytes()
        if suffix(name) != "json":
            found: Sequence[str] = lines(text(data))
        else:
            tree = json_of(data)
            found = _captions(tree) if isinstance(tree, dict) else captions_in(tree, name)
    except OSError as error:
        raise BadSample("unreadable", f"{name}: {error.strerror}") from error
    except BadSample as error:
        raise BadSample(error.reason, f"{name}: {error.detail}") from error
    return [(one, 1.0) for one in found] or list(item.captions)


def folder_repeats(name: str) -> tuple[int, str] | None:
    """(repeats, words) of a folder named as kohya's scripts want it, `NN_words`; None for any other name.

    As there, the words keep their underscores and fewer repeats than 1 leave the folder out. Unlike there, a name that
    is a number alone is no such folder: data sets name classes and years so.
    """
    found = _KOHYA.fullmatch(name)
    return None if found is None else (int(found.group(1)), found.group(2).strip())


def remarks(items: Sequence[Item]) -> list[str]:
    """What of a folder's layout changes how often its pictures come."""
    several = Counter((Path(i.name).parent.as_posix(), i.repeats) for i in items if i.problem is None and i.repeats > 1)
    told = "folder {!r}: its {} pictures come {} times an epoch, the repeats of its name as kohya's scripts read it"
    return [told.format(folder, n, repeats) for (folder, repeats), n in sorted(several.items())]


@dataclass
class _Folder:
    """One folder: its files by name, and what its name or those above say of repeats."""

    path: Path
    files: tuple[str, ...] = ()
    kohya: tuple[int, str] | None = None
    _stems: dict[str, list[str]] | None = None

    def tables(self, *, paired: bool) -> list[Path]:
        by_name = {f.lower(): f for f in reversed(self.files)}
        names = (*METADATA, PAIRED) if paired else METADATA
        return [self.path / by_name[name] for name in names if name in by_name]

    def beside(self, picture: str, kinds: Sequence[str]) -> Path | None:
        """The file of one of these suffixes, in any case, that has a picture's stem, or its whole name before them."""
        if self._stems is None:
            self._stems = {}
            for file in self.files:
                if suffix(file) in (*CAPTION_SUFFIXES, "json") and not passed_over(file):
                    self._stems.setdefault(_plain(os.path.splitext(file)[0]), []).append(file)
        stem = os.path.splitext(picture)[0]
        for wanted in (stem, picture):
            found = self._stems.get(_plain(wanted), ())
            same = [f for f in found if composed(os.path.splitext(f)[0]) == composed(wanted)]
            for kind in kinds:
                if (file := next((f for f in same or found if suffix(f) == kind), None)) is not None:
                    return self.path / file
        return None


def _plain(name: str) -> str:
    return composed(name).casefold()


def _walk(source: Path, closed: Callable[[OSError], None]) -> Iterator[_Folder]:
    """Folders from the top down, each once whatever links lead there; hidden ones are passed over."""
    kohya: dict[str, tuple[int, str] | None] = {}
    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(source, onerror=closed, followlinks=True):
        told = os.stat(folder)
        if (told.st_dev, told.st_ino) in seen:
            folders[:] = []
            continue
        seen.add((told.st_dev, told.st_ino))
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not passed_over(f"{f}/x"))
        here = Path(folder)
        own = folder_repeats(here.resolve().name if here == source else here.name)
        kohya[folder] = own or kohya.get(os.path.dirname(folder))
        yield _Folder(here, tuple(sorted(files)), kohya[folder])


def _pictures(folder: _Folder, source: Path, captions_from: CaptionsFrom) -> Iterator[Item]:
    kohya = folder.kohya if captions_from in ("files", "none") else None
    for file in folder.files:
        if passed_over(file):
            continue
        path = folder.path / file
        name = path.relative_to(source).as_posix()
        item = Item(_key(name), _printable(name), path, repeats=kohya[0] if kohya else 1)
        if (kind := suffix(file)) in UNREAD:
            what = f"{UNREAD[kind]} is not read here; convert it to PNG or JPEG"
            yield replace(item, problem=("unsupported", what))
        elif f".{kind}" not in SUFFIXES:
            if may_be_misnamed(file) and (what := misnamed(_start(path))) is not None:
                yield replace(item, problem=("suffix", what))
        elif item.repeats < 1:
            yield replace(item, problem=("no_repeats", f"its folder's name says {item.repeats} repeats"))
        else:
            yield _captioned(item, folder, captions_from, kohya)


def _start(path: Path) -> bytes:
    """A regular file's first bytes; nothing of any other."""
    with contextlib.suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                return file.read(16)
    return b""


def _captioned(item: Item, folder: _Folder, captions_from: CaptionsFrom, kohya: tuple[int, str] | None) -> Item:
    if captions_from == "none":
        return item
    if captions_from == "files":
        beside = folder.beside(item.path.name, (*CAPTION_SUFFIXES, "json"))
        words = kohya[1] if kohya else ""
        return replace(item, captions=((words, 1.0),) if words else (), caption_file=beside)
    return replace(item, captions=_from_name(item.path, captions_from))


def _from_name(path: Path, captions_from: CaptionsFrom) -> tuple[tuple[str, float], ...]:
    raw = Path(os.path.abspath(path)).parent.name if captions_from == "folder" else path.stem
    words = re.sub(r"[_\-\s]+", " ", _printable(raw)).strip()
    return ((words, 1.0),) if words else ()


def _listed(
    table: Path, folder: _Folder, captions_from: CaptionsFrom, columns: Columns, top: Path | None = None
) -> Iterator[Item]:
    """The items of a metadata table, by its rows; `top` is what names are relative to."""
    top = top or table.parent
    prefix = "" if table.parent == top else f"{table.parent.relative_to(top).as_posix()}/"
    looked: dict[Path, _Folder] = {}
    for row in table_rows(table, columns.images):
        where = f"{prefix}{row.where}"
        if row.problem is not None:
            key = _key(f"{prefix}line-{row.number}")
            yield Item(key, _printable(where), table, problem=("bad_metadata", _printable(row.problem)))
            continue
        try:
            yield _row(row, where, prefix, table, captions_from, columns, looked)
        except BadSample as error:
            name = prefix + row.file
            path = table if row.own is not None else table.parent / row.file
            yield Item(_key(name), _printable(name), path, problem=(error.reason, error.detail), held=row.own)


def _row(
    row: Row,
    where: str,
    prefix: str,
    table: Path,
    captions_from: CaptionsFrom,
    columns: Columns,
    looked: dict[Path, _Folder],
) -> Item:
    """The item of one row. Raises BadSample."""
    name, fields = row.file, dict(row.fields)
    key, shown = _key(prefix + name), _printable(prefix + name)
    path = table if row.own is not None else inside(table.parent, name, where)
    if row.own is None and (kind := suffix(path.name)) in UNREAD:
        raise BadSample("unsupported", f"{UNREAD[kind]} is not read here; convert it to PNG or JPEG")
    if path.parent not in looked:
        looked[path.parent] = _Folder(path.parent, tuple(sorted(os.listdir(path.parent))))
    kohya = folder_repeats(path.parent.name) if captions_from == "files" else None
    repeats = 1 if kohya is None else kohya[0]
    if repeats < 1:
        raise BadSample("no_repeats", f"its folder's name says {repeats} repeats")
    item = Item(key, shown, path, repeats=repeats, held=row.own)
    item = replace(item, partners=in_row(columns.pairs, fields, where, table.parent, row.held))
    if captions_from in ("folder", "name"):
        return replace(item, captions=_from_name(path, captions_from), repeats=1, extra=fields)
    try:
        captions = tuple((c, 1.0) for c in _captions(fields, taken=True, fields=columns.captions))
    except BadSample as error:
        raise BadSample("bad_metadata", f"{where}: {error.detail}") from error
    beside = None if captions or row.own is not None else looked[path.parent].beside(path.name, CAPTION_SUFFIXES)
    words = kohya[1] if kohya and not captions else ""
    captions = captions or (((words, 1.0),) if words else ())
    there = [column for column in columns.captions if column in row.fields]
    told = next((column for column in there if column not in fields), next(iter(there), None))  # which was taken out
    cell = None if told is None else Cell(table, row.number, told)
    return replace(item, captions=captions, caption_file=beside, extra=fields, cell=cell)


def _captions(row: dict[str, Any], *, taken: bool = False, fields: Sequence[str] = CAPTION_FIELDS) -> tuple[str, ...]:
    """The captions of a row or json: its first field of captions that holds any, taken out of it if asked for."""
    for name in fields:
        if name in row and (found := captions_in(row[name], name)):
            if taken:
                del row[name]
            return found
    return ()


def _printable(name: str) -> str:
    """A file's name as text, also one that is not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def _key(name: str) -> str:
    name = _printable(name)
    stem = name.rsplit(".", 1)[0] if "." in os.path.basename(name) else name
    return re.sub(r"[.\s\\]+", "_", stem.strip("/")) or "_"


def _unique(items: list[Item]) -> list[Item]:
    seen: dict[str, int] = {}
    taken = {item.key for item in items}
    result = []
    for item in sorted(items, key=lambda item: item.name):
        count = seen[item.key] = seen.get(item.key, 0) + 1
        key = item.key
        while count > 1 and key in taken:
            key = f"{item.key}-{count}"
            count += 1
        taken.add(key)
        result.append(item if key == item.key else replace(item, key=key))
    return result
