"""Bytes -> text, whatever strangers' editors write: UTF-8 with or without a mark, UTF-16 with one, any line end."""

from __future__ import annotations

import codecs
import json
import math
import re
from pathlib import Path
from typing import Any

from ldm.data.bad import BadSample

_MARKS = (  # UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ENDS = re.compile(r"\r\n|\r|\n")  # not str.splitlines, which also ends lines at form feeds and U+2028
_NO_TEXT = re.compile("[\ud800-\udfff]")


def loose(data: bytes) -> str:
    """The text by its byte order mark, else UTF-8; bytes that are not UTF-8 become surrogates, which `check` finds.

    Raises BadSample not_utf8 if the mark does not tell the truth.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    if encoding in ("utf-16", "utf-32"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            raise BadSample("not_utf8", f"begins as {encoding.upper()}: {error}") from error
    return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")


def encoded(value: str, like: bytes) -> bytes:
    """The bytes of a text in the encoding of a file that `loose` read, with its byte order mark."""
    for mark, codec in (
        (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"), (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):  # fmt: skip
        if like.startswith(mark):
            return mark + value.encode(codec, "surrogateescape" if codec == "utf-8" else "strict")
    return value.encode("utf-8", "surrogateescape")


def line_spans(value: str) -> list[tuple[int, int]]:
    """(start, end) of each line, its end left out; they end as those of `lines`."""
    ends = [found.span() for found in _ENDS.finditer(value)]
    return list(zip([0, *(end for _, end in ends)], [*(start for start, _ in ends), len(value)], strict=True))


def check(value: str) -> str:
    """The text itself; BadSample not_utf8 if it holds what is no text."""
    if (found := _NO_TEXT.search(value)) is not None:
        code = ord(found.group())
        what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"a lone surrogate U+{code:04X}"
        where = f"{what} at character {found.start()}"
        raise BadSample("not_utf8", f"{where}: neither UTF-8 nor UTF-16 with a byte order mark; save it as UTF-8")
    if "\0" in value:
        raise BadSample("not_utf8", "zero bytes, as UTF-16 without a byte order mark has; save it as UTF-8")
    return value


def text(data: bytes) -> str:
    """The text with its ends stripped; BadSample not_utf8 if it is none."""
    return check(loose(data)).strip().strip("\ufeff").strip()


def lines(value: str) -> list[str]:
    """Lines that hold something, stripped; they end with any of the three usual line ends and with nothing else."""
    return [line for raw in _ENDS.split(value) if (line := raw.strip().strip("\ufeff").strip())]


def read_lines(path: Path) -> list[str]:
    """A file's lines that hold something. Raises ValueError that names the file."""
    try:
        return lines(text(path.read_bytes()))
    except OSError as error:
        raise ValueError(f"{str(path)!r}: cannot be read: {error.strerror}") from error
    except BadSample as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def json_of(data: bytes) -> Any:
    """What a json text says; BadSample bad_json."""
    try:
        return json.loads(text(data))
    except (BadSample, ValueError, RecursionError) as error:
        raise BadSample("bad_json", str(error)) from error


def metadata(members: dict[str, bytes]) -> dict[str, Any]:
    """The json member, or nothing; BadSample if it does not parse to keys and values."""
    if "json" not in members:
        return {}
    tree = json_of(members["json"])
    if not isinstance(tree, dict):
        raise BadSample("bad_json", f"expected keys and values, got {type(tree).__name__}")
    return tree


def captions_in(value: Any, name: str) -> tuple[str, ...]:
    """The texts of a json or table value: a text, a number, a list of them; null and what is empty are none.

    Raises BadSample bad_json for anything else, and not_utf8.
    """
    if isinstance(value, (list, tuple)):
        return tuple(one for part in value for one in _caption(part, name))
    return _caption(value, name)


def _caption(value: Any, name: str) -> tuple[str, ...]:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ()
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadSample("bad_json", f"{name} holds {value!r:.80}; expected a text or a list of texts")
    found = check(str(value)).strip()
    return (found,) if found else ()
