"""YAML as people write it: every value with the place and the words it was written with; overrides taken whole.

What YAML 1.1 would silently make of a word stays a word: 12:00:00 is no number of seconds, 010 is not 8, 2024-01-01 is
no date. A key that is given twice is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Parsed = tuple[Any, dict[str, "Place"]]


@dataclass(frozen=True)
class Place:
    """Where a value stands: a file's line and column, or an override. `text`: the words of a value without quotes."""

    file: str = ""
    line: int = 0
    column: int = 0
    text: str | None = None
    remark: str = ""

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}, column {self.column}" if self.file else self.remark


class Tree(dict[str, Any]):
    """Keys and values of a config, with `places` by dotted key: "train.steps", "data.sources[0].weight".

    `earlier`: the keys that were written by an earlier name.
    """

    def __init__(self, values: dict[str, Any], places: dict[str, Place], earlier: tuple[str, ...] = ()) -> None:
        super().__init__(values)
        self.places, self.earlier = places, earlier


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (yaml's own way)


for _tag, _pattern, _first in (
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9_]+(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def parse_file(path: Path) -> Parsed:
    """A file's plain data and places. Raises ValueError that names file, line and column."""
    where = f"config {str(path)!r}"
    try:
        text = _decoded(path.read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not text in UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error
    except OSError as error:
        raise ValueError(f"{where}: cannot be read: {error.strerror}") from error
    places: dict[str, Place] = {}
    try:
        node = yaml.compose(text, Loader=_Loader)
        _walk(node, "", str(path), places)
        return _construct(node), places
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not readable as YAML: {_said(error)}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def parse_value(text: str) -> tuple[Any, Place]:
    """An override's value, and its words for keys that want words: those are taken whole, `#` and all.

    Raises ValueError for a list or keys and values behind which YAML would see a comment, or with a key given twice.
    """
    if not text.strip():
        return text.strip(), Place(text=text)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        return text, Place(text=text, remark=f"not readable as YAML: {_said(error)}")
    if node is None or text.lstrip()[0] in "!&":
        return text, Place(text=text)
    behind = text[node.end_mark.index :].strip()
    if isinstance(node, yaml.ScalarNode):
        if behind or (node.style is None and node.tag.endswith(":str")):
            return text, Place(text=text)
        return _construct(node), Place(text=text if node.style is None else None)
    if behind:
        raise ValueError(f"{behind!r} begins a comment in YAML; quote what it belongs to")
    _walk(node, "", "", {})
    flow = bool(node.flow_style)
    return _construct(node), Place(text=None if flow else text)


def _decoded(data: bytes) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16")
    return data.decode("utf-8-sig")


def _construct(node: Any) -> Any:
    loader = _Loader("")
    try:
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _walk(node: Any, key: str, file: str, places: dict[str, Place]) -> None:
    """Enter the places of a node and of what is in it. Raises ValueError for a key that is given twice."""
    if node is None:
        return
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    places[key] = Place(file, node.start_mark.line + 1, node.start_mark.column + 1, node.value if plain else None)
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _walk(item, f"{key}[{i}]", file, places)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, Any] = {}
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                continue
            if name.value in seen and not name.tag.endswith(":merge"):
                at = f"line {name.start_mark.line + 1}, column {name.start_mark.column + 1}"
                first = seen[name.value].start_mark.line + 1
                raise ValueError(f"{at}: the key {name.value!r} is given a second time, first on line {first}")
            seen[name.value] = name
            _walk(value, f"{key}.{name.value}" if key else name.value, file, places)


def _said(error: yaml.YAMLError) -> str:
    """What is wrong and where, in one line."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    at = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    problem = (error.problem or error.context or "").strip()
    if "'\\t'" in problem:
        problem += "; indent with blanks, not with tabs"
    elif "mapping values are not allowed" in problem:
        problem += "; a text with a colon needs quotes, and keys of one level the same indent"
    before, context = error.context_mark, ""
    if error.context and error.problem and before and mark and before.line != mark.line:
        context = f" ({error.context}, begun on line {before.line + 1})"
    return f"{at}{problem}{context}"
