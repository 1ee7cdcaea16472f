"""What a run was trained with, as its checkpoints keep it, and what a later start has otherwise.

A record is plain data: `config`, the whole config; `content`, hashes of the data and of the models that it began with;
`ranks`, how many processes; `history`, what starts changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ldm.config.earlier import today

Record = dict[str, Any]

SILENT = (
    "name", "out", "workers", "data*.path", "data*.memory", "data*.quarantine", "data*.max_bad", "data*.remote*",
    "task.samples*", "task.vae", "task.text", "task.base", "task.teacher", "task.start", "task.images",
    "task.concepts*.images", "task.prior*",
)  # fmt: skip
"""Keys that change nothing of what is learned, or whose content is compared instead of the name."""
RULES = (
    ("seed", "another seed"),
    ("data*", "other data"),
    ("task.kind", "another method"),
    ("task.network*", "another model"),
    ("task.model*", "another model"),
    ("task.discriminator*", "another model"),
    ("task.guidance_embedding", "another model"),
    ("task.adapter*", "another adapter"),
    ("task.lora*", "another adapter"),
    ("task.concepts*", "another adapter"),
    ("task.process*", "another objective"),
    ("task.options*", "another objective"),
    ("task.weighting*", "another objective"),
    ("task.loss*", "another objective"),
    ("task.method*", "another objective"),
    ("task.prediction", "another objective"),
    ("task.cache", ""),
    ("task.gradient_checkpointing", ""),
    ("task.validat*", ""),
    ("task*", "another task"),
    ("train.optim.algorithm", "another optimizer"),
    ("train.engine.frozen", "other frozen weights"),
)
"""What a change of a key makes of the run, by the first pattern that fits; "" and keys of none may change."""
WORDS = {"vae": "autoencoder", "text": "text tower", "base": "base model", "teacher": "teacher", "start": "start"}


@dataclass(frozen=True)
class Change:
    """A key that is not what it was; `makes` is what that makes of the run, "" where it may change."""

    key: str
    before: Any
    now: Any
    makes: str = ""

    def __str__(self) -> str:
        if self.key.startswith("data") and self.key.endswith(".path"):
            more = "" if self.before == self.now else f": {self.before} → {self.now}"
            return f"{self.key}: other samples than before{more}"
        if self.key.removeprefix("task.") in WORDS and self.before == self.now:
            return f"{self.key}: other weights under the same name or another"
        return f"{self.key} {_short(self.before)} → {_short(self.now)}"


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What is not as it was, those that make it something else first. Keys that one of both does not know are equal."""
    found: list[Change] = []
    _differ(today(before.get("config") or {})[0], today(now.get("config") or {})[0], "", found)
    found += _content(before.get("content") or {}, now.get("content") or {})
    if before.get("ranks") and now.get("ranks") and before["ranks"] != now["ranks"]:
        found.append(Change("processes", before["ranks"], now["ranks"]))
    return sorted(found, key=lambda c: not c.makes)


def told(changes: Sequence[Change], most: int = 8) -> str:
    """In a line, those that make something else by what they make."""
    groups: dict[str, list[str]] = {}
    for change in changes:
        groups.setdefault(change.makes, []).append(str(change))
    parts = []
    for makes, each in groups.items():
        line = ", ".join(each[:most]) + (f", and {len(each) - most} more" if len(each) > most else "")
        parts.append(f"{makes} ({line})" if makes else line)
    return "; ".join(parts)


def _differ(before: Any, now: Any, key: str, found: list[Change]) -> None:
    if before == now or any(fnmatchcase(key, pattern) for pattern in SILENT):
        return
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        if before.get("kind") != now.get("kind"):
            found.append(_change(f"{key}.kind" if key == "task" else key, before, now))
            return
        for name in sorted({*before} & {*now}):
            _differ(before[name], now[name], f"{key}.{name}" if key else name, found)
    elif _dicts(before) and _dicts(now) and len(before) == len(now):
        for i, (one, other) in enumerate(zip(before, now, strict=True)):
            _differ(one, other, f"{key}.{i}", found)
    else:
        found.append(_change(key, before, now))


def _dicts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _change(key: str, before: Any, now: Any) -> Change:
    return Change(key, before, now, next((makes for pattern, makes in RULES if fnmatchcase(key, pattern)), ""))


def _content(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    found: list[Change] = []
    was, have = before.get("data") or [], now.get("data") or []
    if len(was) == len(have):  # otherwise the config tells
        for i, (one, other) in enumerate(zip(was, have, strict=True)):
            if one and other and one["hash"] != other["hash"]:
                key = "data.path" if len(was) == 1 else f"data.sources.{i}.data.path"
                found.append(Change(key, one["samples"], other["samples"], "other data"))
    old, new = before.get("models") or {}, now.get("models") or {}
    for name in sorted({*old} & {*new}):
        one, other = old[name], new[name]
        if bool(one) != bool(other):
            names = ["one" if v else "none" for v in (one, other)]
            found.append(Change(f"task.{name}", names[0], names[1], f"another {WORDS.get(name, name)}"))
        elif one != other:
            found.append(Change(f"task.{name}", "", "", f"another {WORDS.get(name, name)}"))
    return found


def _short(value: Any) -> str:
    """A value in a few characters."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        if "kind" in value:
            return str(value["kind"])
        return "on (" + ", ".join(f"{k} {_short(v)}" for k, v in list(value.items())[:2]) + ")"
    if value is None:
        return "none"
    if _dicts(value):
        return f"{len(value)} of them"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
