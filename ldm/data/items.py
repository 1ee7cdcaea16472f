"""A picture that a folder or a table names, with what is said of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.data.listing import Embedded

Partner = Path | Embedded
"""Where a partner's bytes are."""


@dataclass(frozen=True)
class Cell:
    """Where a metadata table says a picture's caption, or has room for one; rows as `Row.number` counts them."""

    table: Path
    row: int
    column: str


@dataclass(frozen=True)
class Item:
    """A picture to read. `problem` is set instead when the source itself says nothing usable about it.

    `held` is where its bytes are if it is no file of its own, `partners` are the pictures that belong to it, `cell` is
    where its caption is if a table has a column for it.
    """

    key: str
    name: str
    path: Path
    captions: tuple[tuple[str, float], ...] = ()
    caption_file: Path | None = None
    repeats: int = 1
    extra: dict[str, Any] = field(default_factory=dict)
    problem: tuple[str, str] | None = None
    held: Embedded | None = None
    partners: dict[str, Partner] = field(default_factory=dict)
    cell: Cell | None = None
