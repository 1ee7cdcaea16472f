"""Tables of metadata beside pictures, as Hugging Face's imagefolder has them: csv, tsv, jsonl and parquet."""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ldm.data.bad import BadSample
from ldm.data.formats import suffix
from ldm.data.texts import check, lines, loose

FILE = "file_name"
_MOST = 1 << 24
"""Characters of a cell; Python's own limit is 131,072."""


@dataclass(frozen=True)
class Embedded:
    """A picture whose bytes are in a parquet file, as `datasets` stores them: in a row, from 0, of a column."""

    table: Path
    row: int
    column: str

    def read(self) -> bytes:
        """Its bytes. Raises BadSample where the row holds none."""
        data = _column(self.table, self.column, self.row)
        if not data:
            raise BadSample("missing", f"{self.table.name}: row {self.row + 1} has no bytes in {self.column}")
        return data


@dataclass(frozen=True)
class Row:
    """A row of a metadata table: the file it is of and its other fields, or what is wrong with it.

    `held` are the pictures whose bytes the table itself holds, by column; `own` is that of the row, which has no file.
    """

    where: str
    number: int
    file: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    held: dict[str, Embedded] = field(default_factory=dict)
    own: Embedded | None = None


def is_table(path: Path) -> bool:
    """Whether a file is read as a metadata table, by its suffix."""
    return suffix(path.name) in _READERS


def table_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a metadata table, numbered by line (csv, jsonl) or row (parquet); what is wrong is a row of its own.

    A field that the table does not give is absent. The file is in the first of `columns` that there is, also as
    NAME_file_name; of none or several it may also be in file_name, or in a column that ends so.
    """
    number = 0
    try:
        held = held_columns(path)
        for number, row in _READERS[suffix(path.name)](path):
            yield _checked(path, number, row, columns, held)
    except BadSample as error:
        yield Row(path.name, number, problem=f"{path.name}: {error.detail}")
    except (OSError, ValueError, csv.Error) as error:
        yield Row(path.name, number, problem=f"{path.name}: cannot be read after row {number}: {error}")


def column_of(name: str, row: Mapping[str, Any], held: Collection[str] = ()) -> str | None:
    """A column of that name in a row, or NAME_file_name as Hugging Face's imagefolder has it."""
    return next((c for c in (name, f"{name}_{FILE}") if c in row or c in held), None)


def _checked(path: Path, number: int, row: dict[str, Any] | str, columns: Sequence[str], held: Collection[str]) -> Row:
    where = f"{path.name}:{number}"
    if isinstance(row, str):
        return Row(where, number, problem=f"{where}: {row}")
    inner = {column: Embedded(path, number - 1, column) for column in held}
    asked = next((c for name in columns if (c := column_of(name, row, held)) is not None), None)
    usual = FILE if FILE in row else next((k for k in row if k.endswith(f"_{FILE}")), FILE)
    name = asked or (columns[0] if len(columns) == 1 else usual)
    own, file = inner.pop(name, None), row.get(name)
    if own is not None:
        file = f"{path.stem}-{number:07d}"
    if not isinstance(file, str) or not file:
        hint = f"; pictures are inside it: --image-column {' or '.join(held)}" if held else ""
        return Row(where, number, problem=f"{where}: no {name}; it has {', '.join(map(str, row)) or 'nothing'}{hint}")
    fields = {k: v for k, v in row.items() if k != name}
    try:
        for value in (file, *fields, *fields.values()):
            if isinstance(value, str):
                check(value)
    except BadSample as error:
        return Row(where, number, problem=f"{where}: {error.detail}")
    return Row(where, number, file, fields, held=inner, own=own)


@dataclass(frozen=True)
class Record:
    """A record of a CSV text: the line that it ends on, its place in the text, its cells, or what is wrong with it."""

    line: int
    start: int
    end: int
    cells: list[str]
    error: str = ""


def csv_records(value: str, kind: str) -> tuple[str, Iterator[Record]]:
    """What separates the cells of a text of `kind` csv or tsv, and its records, the header first."""
    separator, begin = "\t" if kind == "tsv" else ",", 0
    if value[:4].lower() == "sep=":  # how Excel says it
        separator, begin = value[4], len(value) - len(value[5:].lstrip("\r\n"))
    first = next(iter(lines(value[begin : begin + 100_000])), "")
    if separator == "," and FILE not in first.split(",") and (other := _other(first)):
        separator = other
    return separator, _records(value, begin, separator)


def _records(value: str, begin: int, separator: str) -> Iterator[Record]:
    """As RFC 4180: quoted cells hold line ends and separators."""
    end = begin

    def told() -> Iterator[str]:
        nonlocal end
        for line in io.StringIO(value[begin:], newline=""):
            end += len(line)
            yield line

    csv.field_size_limit(_MOST)
    reader = csv.reader(told(), delimiter=separator, strict=True)
    while True:
        start = end
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(reader.line_num, start, end, [], f"no CSV: {error}")
            continue
        yield Record(reader.line_num, start, end, cells)


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """A column that is there twice keeps its first meaning."""
    separator, records = csv_records(loose(path.read_bytes()), suffix(path.name))
    head = next(records, Record(0, 0, 0, []))
    if head.error:
        raise csv.Error(head.error.removeprefix("no CSV: "))
    names = column_names(head.cells)
    for record in records:
        if record.error:
            yield record.line, record.error
            continue
        if not any(record.cells):
            continue
        extra = record.cells[len(names) :]
        if any(extra):
            told = f"{len(record.cells)} cells for {len(names)} columns; quote what holds a {separator!r}"
            yield record.line, told
            continue
        yield record.line, {n: c for n, c in zip(names, record.cells, strict=False) if n}


def _other(header: str) -> str | None:
    """What separates the cells of a header that has no comma where one is expected."""
    return next((s for s in (";", "\t") if FILE in (c.strip(' "') for c in header.split(s)) and s in header), None)


def column_names(head: Sequence[str]) -> list[str]:
    """Those of a header's cells; the second one of a name becomes `NAME.1`, as pandas calls it."""
    seen: Counter[str] = Counter()
    given = []
    for name in (cell.strip() for cell in head):
        given.append(f"{name}.{seen[name]}" if name and seen[name] else name)
        seen[name] += 1
    return given


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(loose(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(check(line))
        except BadSample as error:
            yield number, error.detail
            continue
        except (ValueError, RecursionError) as error:
            yield number, str(error)
            continue
        yield number, row if isinstance(row, dict) else "expected keys and values"


def _json(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """A list of rows, or one on each line, as ControlNet's authors have them in prompt.json."""
    start = loose(path.read_bytes()).lstrip()
    if not start.startswith("["):
        yield from _jsonl(path)
        return
    try:
        rows = json.loads(check(start))
    except (ValueError, RecursionError) as error:
        yield 1, str(error)
        return
    for number, row in enumerate(rows, 1):
        yield number, row if isinstance(row, dict) else "expected keys and values"


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Rows without the bytes of pictures, which are left where they are."""
    file = _parquet_file(path)
    leaves = [file.schema.column(i) for i in range(len(file.schema))]
    names = [leaf.path for leaf in leaves if leaf.physical_type != "BYTE_ARRAY" or leaf.logical_type.type != "NONE"]
    number = 0
    for batch in file.iter_batches(columns=names):
        for row in batch.to_pylist():
            number += 1
            yield number, {k: _as_json(v) for k, v in row.items() if not isinstance(v, bytes)}


def held_columns(path: Path) -> tuple[str, ...]:
    """The columns of a parquet file that hold pictures as bytes: binary ones, and `datasets`' {bytes, path}."""
    if suffix(path.name) != "parquet":
        return ()
    file = _parquet_file(path)
    leaves = (file.schema.column(i) for i in range(len(file.schema)))
    raw = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type == "NONE"]
    return tuple(name.removesuffix(".bytes") for name in raw if name.count(".") == name.endswith(".bytes"))


def _parquet_file(path: Path) -> Any:
    try:
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("reading parquet needs pyarrow: pip install 'ldm[parquet]'") from error
    return pyarrow.parquet.ParquetFile(path)


def _column(path: Path, column: str, row: int) -> bytes | None:
    """The bytes in a row of a column of pictures; a group of rows is read once for neighbours."""
    file = _parquet_file(path)
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if row < count:
            return _group(path, column, group)[row]
        row -= count
    return None


@lru_cache(maxsize=4)
def _group(path: Path, column: str, group: int) -> list[bytes | None]:
    file = _parquet_file(path)
    values = file.read_row_group(group, columns=[column]).column(column).to_pylist()
    return [v.get("bytes") if isinstance(v, dict) else v for v in values]


def _as_json(value: Any) -> Any:
    """Times, decimals and the like as text; bytes are none."""
    if isinstance(value, dict):
        return {str(k): _as_json(v) for k, v in value.items() if not isinstance(v, bytes)}
    if isinstance(value, (list, tuple)):
        return [_as_json(v) for v in value if not isinstance(v, bytes)]
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)


_READERS = {"csv": _csv, "tsv": _csv, "jsonl": _jsonl, "ndjson": _jsonl, "json": _json, "parquet": _parquet}


def file_named(folder: Path, name: str) -> Path | None:
    """The file that a table means by a name: also with Windows' separators, other letter case or accents' other form.

    None where there is none, or several.
    """
    here = folder
    for part in name.replace("\\", "/").split("/"):
        if part in ("", "."):
            continue
        if part == os.pardir:
            return None
        exact = here / part
        if not exact.exists():
            listed = os.listdir(here) if here.is_dir() else []
            found = [f for f in listed if _plain(f) == _plain(part)]
            if len(found) != 1:
                return None
            exact = here / found[0]
        here = exact
    return here if here.is_file() else None


def inside(base: Path, name: str, where: str) -> Path:
    """The file that a table in the folder `base` means by a name. Raises BadSample outside or missing."""
    shown = name.encode("utf-8", "backslashreplace").decode()
    inner = os.path.normpath(os.path.relpath(name, os.path.abspath(base)) if os.path.isabs(name) else name)
    if os.path.normpath(inner.replace("\\", "/")).split("/")[0] == os.pardir:
        raise BadSample("outside", f"{where}: {shown!r} leaves the folder")
    path = base / inner if (base / inner).is_file() else file_named(base, inner)
    if path is None:
        raise BadSample("missing", f"{where}: no such file")
    return path


def composed(name: str) -> str:
    """One form of letters with accents, which systems store in two."""
    return unicodedata.normalize("NFC", name)


def _plain(name: str) -> str:
    return composed(name).casefold()
