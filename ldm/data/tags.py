"""Captions as lists of tags: which stay, which are shuffled, which are dropped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ldm.data.captions import uniform


@dataclass(frozen=True, kw_only=True)
class Tags:
    """Captions as lists of tags: the first `keep` stay, the others are shuffled and each dropped at a rate.

    `prefix` and `suffix` are put around the caption before it is split. Where a caption holds `keep_separator`, the
    tags before it stay instead of the first `keep`, and those after a second one stay at the end. Parts that
    `secondary` joins are one tag, and are separated at the end. `rates`: regular expressions of whole tags and the rate
    at which these are dropped, also of tags that stay; the first that fits.
    """

    separator: str = ","
    """What stands between two tags."""
    shuffle: bool = True
    """Whether the tags that do not stay are shuffled."""
    keep: int = 1
    dropout: float = 0.0
    """The rate at which each tag that does not stay is dropped."""
    prefix: str = ""
    suffix: str = ""
    keep_separator: str = ""
    secondary: str = ""
    rates: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.separator:
            raise ValueError("separator must not be empty")
        if self.keep < 0 or not 0 <= self.dropout < 1:
            raise ValueError(f"keep {self.keep} must not be negative, dropout {self.dropout} must be in [0, 1)")
        for pattern, rate in self.rates.items():
            if not 0 <= rate <= 1:
                raise ValueError(f"rates: {rate} of {pattern!r} must be in [0, 1]")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"rates: {pattern!r}: no regular expression: {error}") from None

    def apply(self, caption: str, seed: int, position: int) -> str:
        """The caption at a position; joined with the separator and a space."""
        caption = " ".join(part for part in (self.prefix, caption, self.suffix) if part)
        first, flexible, last = self._parts(caption)
        draws = {p: uniform(seed, position, f"tag {p}") for p in flexible}
        rest = [p for p in flexible if self._stays(p, self.dropout, seed, position)]
        rest = sorted(rest, key=lambda p: draws[p]) if self.shuffle else rest
        ends = [[p for p in end if self._stays(p, 0.0, seed, position)] for end in (first, last)]
        joined = f"{self.separator} ".join([*ends[0], *rest, *ends[1]])
        return joined.replace(self.secondary, self.separator) if self.secondary else joined

    def _parts(self, caption: str) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
        """Tags that stay at the beginning, others, tags that stay at the end."""
        if self.keep_separator and self.keep_separator in caption:
            first, rest = caption.split(self.keep_separator, 1)
            middle, _, last = rest.partition(self.keep_separator)
            return self._split(first), self._split(middle), self._split(last)
        parts = self._split(caption)
        return parts[: self.keep], parts[self.keep :], []

    def _split(self, text: str) -> list[str]:
        return [p.strip() for p in text.split(self.separator) if p.strip()]

    def _stays(self, tag: str, usual: float, seed: int, position: int) -> bool:
        rate = next((rate for pattern, rate in self.rates.items() if re.fullmatch(pattern, tag)), usual)
        return not rate or uniform(seed, position, f"tag drop {tag}") >= rate
