"""Files of sample prompts as kohya's scripts read them: lines with --w --h --s --d --l --n, or JSON and TOML lists."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.data.texts import read_lines

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

_OPTIONS = {"w": "width", "h": "height", "s": "steps", "d": "seed", "l": "guidance", "n": "negative"}
_KEYS = {
    "width": "width", "height": "height", "sample_steps": "steps", "steps": "steps", "seed": "seed",
    "scale": "guidance", "guidance_scale": "guidance", "negative_prompt": "negative", "neg": "negative",
}  # fmt: skip
_SIDE = 512
"""The side where a line names one of both alone."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, its own settings under our names (`task.samples.own`), and its options that are not known here."""

    text: str
    own: dict[str, Any] = field(default_factory=dict)
    odd: tuple[str, ...] = ()


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file. Raises ValueError naming it, for values that are no numbers too."""
    where = str(path)
    if path.suffix.lower() in (".json", ".toml"):
        try:
            text = path.read_text(encoding="utf-8-sig")
            tree: Any = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
        except (OSError, ValueError) as error:
            raise ValueError(f"{where!r}: {error}") from error
        rows: Any = tree
        if isinstance(tree, dict):
            common = {k: v for k, v in (tree.get("prompt") or {}).items() if k != "subset"}
            rows = [common | row for row in (tree.get("prompt") or {}).get("subset", [])]
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{where!r}: expected a list of prompts")
        return [of_row(row, where) for row in rows]
    return [of_line(line, where) for line in read_lines(path) if not line.startswith("#")]


def of_line(line: str, where: str) -> Prompt:
    """A prompt with options behind it: "a dog --w 512 --h 768 --d 1"."""
    text, *rest = re.split(r"\s--(?=[a-z]+(?:\s|$))", line.strip())
    told: dict[str, Any] = {}
    odd = []
    for option in rest:
        name, _, value = option.strip().partition(" ")
        if name in _OPTIONS:
            told[_OPTIONS[name]] = value.strip()
        else:
            odd.append(f"--{name}")
    return Prompt(text.strip(), _own(told, where, line), tuple(odd))


def of_row(row: Mapping[str, Any], where: str) -> Prompt:
    """A prompt with keys of its own, as JSON, TOML and ai-toolkit's `samples` have them."""
    told = {_KEYS[k]: v for k, v in row.items() if k in _KEYS and v is not None}
    odd = tuple(k for k in row if k not in _KEYS and k not in ("prompt", "enum"))
    return Prompt(str(row.get("prompt", "")), _own(told, where, str(row.get("prompt", ""))), odd)


def _own(told: Mapping[str, Any], where: str, line: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in told.items():
        if key == "negative":
            found[key] = str(value)
            continue
        try:
            found[key] = float(value) if key == "guidance" else int(str(value))
        except ValueError:
            raise ValueError(f"{where!r}: {key} {value!r} of {line[:60]!r}: expected a number") from None
    if "width" in found or "height" in found:
        found["size"] = [found.pop("height", _SIDE), found.pop("width", _SIDE)]
    return found


def samples_of(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """`task.samples` of prompts: what all have alike among `settings`, the rest as each one's `own`."""
    same = {k: v for k, v in (prompts[0].own if prompts else {}).items() if all(p.own.get(k) == v for p in prompts)}
    own = [{k: v for k, v in p.own.items() if k not in same} for p in prompts]
    found: dict[str, Any] = {"prompts": [p.text for p in prompts], "settings": same}
    return found | ({"own": own} if any(own) else {})
