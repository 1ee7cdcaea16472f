"""Changes captions where files say them, in tables and JSON, and leaves every other byte of those files as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.data.formats import suffix
from ldm.data.listing import Row, column_names, csv_records, table_rows
from ldm.data.texts import captions_in, encoded, line_spans, loose

WRITTEN = ("csv", "tsv", "jsonl", "json")
"""Files whose captions can be changed."""
Changes = Mapping[int, tuple[str, Sequence[str]]]
"""(column, captions) by the number of a table's row."""
Splice = tuple[int, int, str]


def table_with(table: Path, changes: Changes) -> bytes:
    """A table's bytes with other captions. Raises ValueError where a place of captions cannot be told or holds one."""
    data = table.read_bytes()
    value = loose(data)
    splices = _csv(table, value, changes) if suffix(table.name) in ("csv", "tsv") else _jsonl(table, value, changes)
    return encoded(_spliced(value, splices), data)


def json_with(file: Path, captions: Sequence[str], columns: Sequence[str]) -> bytes:
    """The bytes of a picture's own JSON, whose captions are in the first of `columns` that holds any, or are all of it.

    Raises ValueError where it holds one caption and several are given.
    """
    data = file.read_bytes()
    value = loose(data)
    start = len(value) - len(value.lstrip("\ufeff \t\r\n"))
    tree, end = json.JSONDecoder().raw_decode(value, start)
    if isinstance(tree, dict):
        there = [name for name in columns if name in tree]
        column = next((name for name in there if captions_in(tree[name], name)), next(iter(there), columns[0]))
        splice = _in_object(file.name, value, start, column, captions)
    else:
        splice = (start, end, _dumped(file.name, tree, captions))
    return encoded(_spliced(value, [splice]), data)


def check_kept(old: Path, new: Path, changes: Changes) -> None:
    """Raise ValueError unless a table's new file reads as the old one with other captions."""
    before, after = list(table_rows(old)), list(table_rows(new))
    if len(before) == len(after) and all(
        one.number == other.number and _rest(one, changes) == _rest(other, changes) and _as_told(other, changes)
        for one, other in zip(before, after, strict=True)
    ):
        return
    raise ValueError(f"{old.name}: cannot be written back without loss; change the captions there")


def _rest(row: Row, changes: Changes) -> Any:
    column = changes[row.number][0] if row.number in changes else None
    fields = [(k, v) for k, v in row.fields.items() if k != column]
    return row.number, row.file, fields, None if row.problem is None else row.problem.partition(":")[2]


def _as_told(row: Row, changes: Changes) -> bool:
    if row.number not in changes:
        return True
    column, captions = changes[row.number]
    return captions_in(row.fields.get(column), column) == tuple(captions)


def _spliced(value: str, splices: Sequence[Splice]) -> str:
    parts, at = [], 0
    for start, end, new in sorted(splices):
        parts += [value[at:start], new]
        at = end
    return "".join([*parts, value[at:]])


def _csv(table: Path, value: str, changes: Changes) -> list[Splice]:
    separator, records = csv_records(value, suffix(table.name))
    names = column_names(next(records).cells)
    cell = re.compile(rf'("(?:[^"]|"")*"|[^{re.escape(separator)}\r\n]*)(?:{re.escape(separator)}|[\r\n]+|$)')
    found = []
    for record in records:
        if record.line not in changes:
            continue
        column, captions = changes[record.line]
        if len(captions) > 1:
            raise ValueError(f"{table.name}:{record.line}: holds one caption, got {len(captions)} lines")
        at, k = record.start, names.index(column)
        for told in record.cells[: k + 1]:
            place = cell.match(value, at, record.end)
            if place is None or _unquoted(place[1]) != told:
                raise ValueError(
                    f"{table.name}:{record.line}: its cells cannot be told apart; change the caption there"
                )
            at = place.end()
        found.append((place.start(1), place.end(1), _quoted("".join(captions), place[1], separator)))
    return found


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if cell.startswith('"') else cell


def _quoted(text: str, was: str, separator: str) -> str:
    """A cell, in quotes where it was, or where it must be."""
    if was.startswith('"') or any(c in text for c in (separator, '"', "\r", "\n")):
        return f'"{text.replace(chr(34), chr(34) * 2)}"'
    return text


def _jsonl(table: Path, value: str, changes: Changes) -> list[Splice]:
    spans, found = line_spans(value), []
    for number, (column, captions) in changes.items():
        start, end = spans[number - 1]
        start += len(value[start:end]) - len(value[start:end].lstrip())
        found.append(_in_object(f"{table.name}:{number}", value, start, column, captions))
    return found


def _in_object(where: str, value: str, start: int, column: str, captions: Sequence[str]) -> Splice:
    """The change of a field of the JSON object that begins at `start`; a new field comes first."""
    decoder, blank = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")

    def past(at: int) -> int:
        found = blank.match(value, at)
        return at if found is None else found.end()

    at, place = past(start + 1), None
    first = at
    while value[at] != "}":
        name, at = decoder.raw_decode(value, at)
        begin = past(past(at) + 1)  # behind the colon
        held, end = decoder.raw_decode(value, begin)
        if name == column:
            place = (begin, end, held)  # of several with one name the last counts
        at = past(end)
        at = past(at + 1) if value[at] == "," else at
    if place is None:
        comma = ", " if value[first] != "}" else ""
        return first, first, f"{json.dumps(column)}: {_dumped(where, '', captions)}{comma}"
    return place[0], place[1], _dumped(where, place[2], captions)


def _dumped(where: str, was: Any, captions: Sequence[str]) -> str:
    """Captions as JSON: a list where one was, else one text."""
    if not isinstance(was, list) and len(captions) > 1:
        raise ValueError(f"{where}: holds one caption, got {len(captions)} lines")
    return json.dumps(list(captions) if isinstance(was, list) else "".join(captions), ensure_ascii=False)
