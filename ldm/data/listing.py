"""Tables of metadata beside pictures, as Hugging Face's imagefolder has them: csv, tsv, jsonl and parquet."""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.data.bad import BadSample
from ldm.data.formats import suffix
from ldm.data.texts import check, lines, loose

FILE = "file_name"
_MOST = 1 << 24
"""Characters of a cell; Python's own limit is 131,072."""


@dataclass(frozen=True)
class Row:
    """A row of a metadata table: the file it is of and its other fields, or what is wrong with it."""

    where: str
    number: int
    file: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def is_table(path: Path) -> bool:
    """Whether a file is read as a metadata table, by its suffix."""
    return suffix(path.name) in _READERS


def table_rows(path: Path) -> Iterator[Row]:
    """The rows of a metadata table, numbered by line (csv, jsonl) or row (parquet); what is wrong is a row of its own.

    A field that the table does not give is absent.
    """
    number = 0
    try:
        for number, row in _READERS[suffix(path.name)](path):
            yield _checked(f"{path.name}:{number}", number, row)
    except BadSample as error:
        yield Row(path.name, number, problem=f"{path.name}: {error.detail}")
    except (OSError, ValueError, csv.Error) as error:
        yield Row(path.name, number, problem=f"{path.name}: cannot be read after row {number}: {error}")


def _checked(where: str, number: int, row: dict[str, Any] | str) -> Row:
    if isinstance(row, str):
        return Row(where, number, problem=f"{where}: {row}")
    name = FILE if FILE in row else next((k for k in row if k.endswith(f"_{FILE}")), FILE)
    file = row.get(name)
    if not isinstance(file, str) or not file:
        return Row(where, number, problem=f"{where}: no {FILE}; it has {', '.join(map(str, row)) or 'nothing'}")
    fields = {k: v for k, v in row.items() if k != name}
    try:
        for value in (file, *fields, *fields.values()):
            if isinstance(value, str):
                check(value)
    except BadSample as error:
        return Row(where, number, problem=f"{where}: {error.detail}")
    return Row(where, number, file, fields)


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """As RFC 4180: quoted cells hold line ends and separators. A column that is there twice keeps its first meaning."""
    value = loose(path.read_bytes())
    separator = "\t" if suffix(path.name) == "tsv" else ","
    if value[:4].lower() == "sep=":  # how Excel says it
        separator, value = value[4], value[5:].lstrip("\r\n")
    first = next(iter(lines(value[:100_000])), "")
    if separator == "," and FILE not in first.split(",") and (other := _other(first)):
        separator = other
    csv.field_size_limit(_MOST)
    reader = csv.reader(io.StringIO(value, newline=""), delimiter=separator, strict=True)
    names = _names([name.strip() for name in next(reader, [])])
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, f"no CSV: {error}"
            continue
        if not any(cells):
            continue
        extra = cells[len(names) :]
        if any(extra):
            told = f"{len(cells)} cells for {len(names)} columns; quote what holds a {separator!r}"
            yield reader.line_num, told
            continue
        yield reader.line_num, {n: c for n, c in zip(names, cells, strict=False) if n}


def _other(header: str) -> str | None:
    """What separates the cells of a header that has no comma where one is expected."""
    return next((s for s in (";", "\t") if FILE in (c.strip(' "') for c in header.split(s)) and s in header), None)


def _names(names: list[str]) -> list[str]:
    """Column names; the second one of a name becomes `NAME.1`, as pandas calls it."""
    seen: Counter[str] = Counter()
    given = []
    for name in names:
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


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    try:
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("reading parquet needs pyarrow: pip install 'ldm[parquet]'") from error
    for number, row in enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1):
        yield number, {k: _as_json(v) for k, v in row.items() if not isinstance(v, bytes)}


def _as_json(value: Any) -> Any:
    """Times, decimals and the like as text; bytes are none."""
    if isinstance(value, dict):
        return {str(k): _as_json(v) for k, v in value.items() if not isinstance(v, bytes)}
    if isinstance(value, (list, tuple)):
        return [_as_json(v) for v in value if not isinstance(v, bytes)]
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)


_READERS = {"csv": _csv, "tsv": _csv, "jsonl": _jsonl, "ndjson": _jsonl, "parquet": _parquet}


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


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
