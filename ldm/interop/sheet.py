"""What becomes of another program's settings: our config, and for each of their keys a row that says so."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Fate = Literal["kept", "near", "left out", "refused"]


@dataclass(frozen=True)
class Row:
    """One key of theirs and what became of it.

    "near": honoured but for what `note` tells. "left out": nothing that is trained depends on it. "refused": the result
    depends on it, and it cannot be honoured.
    """

    key: str
    value: str
    fate: Fate
    ours: str = ""
    given: str = ""
    note: str = ""


@dataclass(frozen=True)
class Converted:
    """A run's config as plain data, the rows of its keys, and the commands that come before it."""

    program: str
    tree: dict[str, Any]
    rows: tuple[Row, ...]
    before: tuple[str, ...] = ()

    @property
    def refused(self) -> list[Row]:
        """Keys that change the result and are not honoured."""
        return [row for row in self.rows if row.fate == "refused"]

    def count(self, fate: Fate) -> int:
        """How many keys fared so."""
        return sum(row.fate == fate for row in self.rows)


@dataclass
class Sheet:
    """Their settings while they are gone through; what no reader told of is refused at the end.

    Every reader of a value takes a `default`, theirs, for a key that is not given.
    """

    program: str
    given: Mapping[str, Any]
    tree: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    _told: set[str] = field(default_factory=set)

    def has(self, key: str) -> bool:
        """Whether the key is given with a value."""
        return self.given.get(key) is not None

    def text(self, key: str, default: str = "") -> str:
        """A text. Raises ValueError for a list of several."""
        value = self.given.get(key)
        if isinstance(value, (list, tuple)) and len(value) == 1:
            value = value[0]
        if isinstance(value, (list, tuple, dict)):
            raise ValueError(f"{self.program}: {key}: expected one value, got {value!r}")
        return default if value is None else str(value)

    def texts(self, key: str) -> list[str]:
        """Texts: of a list, or one."""
        value = self.given.get(key)
        return [] if value is None else [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]

    def number(self, key: str, default: float = 0.0) -> float:
        """A finite number, also of a text such as 1e-4. Raises ValueError."""
        value = self.text(key)
        if not value:
            return default
        try:
            found = float(value)
        except ValueError:
            found = math.nan
        if isinstance(self.given.get(key), bool) or not math.isfinite(found):
            raise ValueError(f"{self.program}: {key}: expected a number, got {self.given[key]!r}")
        return found

    def whole(self, key: str, default: int = 0) -> int:
        """A whole number. Raises ValueError."""
        found = self.number(key, default)
        if found != int(found):
            raise ValueError(f"{self.program}: {key}: expected a whole number, got {self.given[key]!r}")
        return int(found)

    def flag(self, key: str, default: bool = False) -> bool:
        """Whether it is on. Raises ValueError for what is neither yes nor no."""
        value = self.given.get(key)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        known = {"true": True, "1": True, "yes": True, "": True, "false": False, "0": False, "no": False, "none": False}
        if (found := known.get(str(value).lower())) is None:
            raise ValueError(f"{self.program}: {key}: expected true or false, got {value!r}")
        return found

    def put(self, ours: str, value: Any) -> None:
        """Set a key of our config by its path."""
        *above, last = ours.split(".")
        tree = self.tree
        for name in above:
            tree = tree.setdefault(name, {})
        tree[last] = value

    def keep(self, key: str, ours: str, value: Any, note: str = "", fate: Fate = "kept") -> None:
        """Their key becomes `value` of ours; a key that is not given shows its default."""
        if ours:
            self.put(ours, value)
        shown = "" if value is None and not ours else _shown(value)
        self._tell(Row(key, self._value(key), fate, ours, shown, note))

    def near(self, key: str, ours: str, value: Any, note: str) -> None:
        """As `keep`, but for what `note` says."""
        self.keep(key, ours, value, note, "near")

    def leave(self, note: str, *keys: str) -> None:
        """Those of the keys that are given, and not told yet, change nothing that is trained, or are met elsewhere."""
        for key in keys:
            if key in self.given and key not in self._told:
                self._tell(Row(key, self._value(key), "left out", note=note))

    def refuse(self, key: str, note: str) -> None:
        """It cannot be honoured, and the result depends on it."""
        self._tell(Row(key, self._value(key), "refused", note=note))

    def lacking(self, key: str, note: str, neutral: Iterable[Any] = ()) -> None:
        """Refuse a key that is given, unless off, empty or one of the values that change nothing here."""
        if key not in self.given or key in self._told:
            return
        value = self.given[key]
        off = value in (None, False, "", [], {}) or str(value).lower() in ("false", "none", "null")
        as_number = str(value).removesuffix(".0")
        if off or as_number in {str(n).removesuffix(".0") for n in neutral}:
            self.leave("as here without it", key)
        else:
            self.refuse(key, note)

    def need(self, text: str) -> None:
        """Something without which there is no run at all."""
        self.missing.append(text)

    def told(self, *keys: str) -> None:
        """The keys are dealt with in another's row."""
        self._told.update(keys)

    def done(self) -> Converted:
        """The whole. Raises ValueError where something is missing without which there is no run."""
        for key, value in self.given.items():
            if key in self._told:
                continue
            if value is None or value is False or value in ("", [], {}):
                self.leave("not known here, and off", key)
            else:
                self.refuse(key, "not known here")
        if self.missing:
            raise ValueError(f"{self.program}: " + "; ".join(self.missing))
        first = [key for key in ("name", "out", "seed", "workers", "task", "data", "train") if key in self.tree]
        self.tree = {key: self.tree[key] for key in first}
        return Converted(self.program, self.tree, tuple(dict.fromkeys(self.rows)), tuple(self.before))

    def _value(self, key: str) -> str:
        return _shown(self.given[key]) if key in self.given else "(default)"

    def _tell(self, row: Row) -> None:
        self._told.add(row.key)
        self.rows.append(row)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_shown(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_shown(v) for v in value) + "]"
    return " ".join(str(value).split())


def table(converted: Converted) -> list[str]:
    """Lines that tell, key by key, what became of them; those that are refused or near come first."""
    order: dict[str, int] = {"refused": 0, "near": 1, "kept": 2, "left out": 3}
    rows = sorted(converted.rows, key=lambda row: order[row.fate])
    cells = [("their key", "value", "", "our key", "value", "")]
    cells += [(r.key, _cut(r.value), r.fate, r.ours, _cut(r.given), r.note) for r in rows]
    widths = [max(len(c[i]) for c in cells) for i in range(5)]
    return [" ".join([*(c[i].ljust(widths[i]) for i in range(5)), c[5]]).rstrip() for c in cells]


def _cut(text: str, most: int = 44) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
