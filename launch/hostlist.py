"""SLURM's compressed lists: host names (`n[1-3,07],x`) and tasks per node (`2(x3),1`)."""

from __future__ import annotations

import re


def expand(text: str) -> list[str]:
    """The host names in order. Raises ValueError for unbalanced brackets."""
    return [host for part in _split(text) for host in _expand_part(part)]


def counts(text: str) -> list[int]:
    """Tasks of each node, such as [2, 2, 2, 1] of "2(x3),1"."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError(f"tasks per node: cannot read {part!r} of {text!r}")
        found += [int(match.group(1))] * int(match.group(2) or 1)
    return found


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char == "[") - (char == "]")
        if depth not in (0, 1):
            raise ValueError(f"host list {text!r}: unbalanced brackets")
        if char == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    if depth:
        raise ValueError(f"host list {text!r}: unbalanced brackets")
    return [part for part in [*parts, text[start:]] if part]


def _expand_part(part: str) -> list[str]:
    head, bracket, tail = re.fullmatch(r"([^\[]*)(?:\[([^\]]*)\](.*))?", part).groups()  # type: ignore[union-attr]
    if bracket is None:
        return [head]
    names: list[str] = []
    for piece in bracket.split(","):
        low, dash, high = piece.partition("-")
        numbers = range(int(low), int(high) + 1) if dash else range(int(low), int(low) + 1)
        names += [f"{head}{number:0{len(low)}d}" for number in numbers]
    return [name + rest for name in names for rest in _expand_part(tail or "")]
