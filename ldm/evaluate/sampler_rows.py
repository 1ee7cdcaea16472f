"""What a row of `ldm evaluate samplers` is: a model, a sampler, steps and guidance; and which rows there are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

BOUNDS = ("real", "autoencoder")
"""Rows without a sampler: the captions' own pictures, as they are and through the autoencoder."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model of the table under its name; what is None is the table's own choice."""

    name: str
    source: str
    samplers: tuple[str, ...] | None = None
    steps: tuple[int, ...] | None = None
    guidance: tuple[float, ...] | None = None
    spacing: str | None = None

    def __post_init__(self) -> None:
        if not self.name or any(c in self.name for c in "/\\ |:="):
            raise ValueError(f"model name {self.name!r}: expected a word without / \\ | : = or spaces")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: `count` pictures of a split's captions, drawn in one way."""

    model: str
    source: str
    split: str
    sampler: str
    steps: int
    count: int
    guidance: float = 1.0
    clip_guidance: float = 0.0
    spacing: str | None = None

    @property
    def name(self) -> str:
        """The row's file, without its ending."""
        if self.sampler in BOUNDS:
            return f"{self.model}-{self.sampler}-{self.split}"
        extra = f"-clip{self.clip_guidance:g}" if self.clip_guidance else ""
        return f"{self.model}-{self.sampler}-{self.steps:04d}-g{self.guidance:g}{extra}-{self.split}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which rows: every sampler at every number of steps, guidance and split, for each model.

    `counts` is (least number of steps, pictures): the last pair whose first number is reached applies, so that rows
    of many steps may have fewer pictures. The kernel distance has no bias, so rows of unequal counts compare.
    """

    models: tuple[Entry, ...]
    samplers: tuple[str, ...]
    steps: tuple[int, ...]
    guidance: tuple[float, ...] = (3.0,)
    clip_guidance: tuple[float, ...] = (0.0,)
    splits: tuple[str, ...] = ("train", "compositional")
    counts: tuple[tuple[int, int], ...] = ((0, 1000),)
    bounds: bool = True

    def __post_init__(self) -> None:
        names = [m.name for m in self.models]
        if len(set(names)) != len(names):
            raise ValueError(f"model names must differ, got {names}")
        if any(n < 1 for n in self.steps) or any(count < 2 for _, count in self.counts):
            raise ValueError(f"steps must be at least 1 and counts at least 2, got {self.steps} and {self.counts}")
        if self.counts[0][0] != 0 or any(b[0] <= a[0] for a, b in itertools.pairwise(self.counts)):
            raise ValueError(f"counts: the numbers of steps must rise from 0, got {self.counts}")

    def count(self, steps: int) -> int:
        """Pictures of a row of so many steps."""
        return [pictures for least, pictures in self.counts if steps >= least][-1]

    def cases(self) -> Iterator[Case]:
        """The rows, cheap ones first, so that a stopped run has something of everything."""
        for model, split in itertools.product(self.models[:1] if self.bounds else (), self.splits):
            for sampler in BOUNDS:
                count = self.count(0)
                yield Case(
                    model=model.name, source=model.source, split=split, sampler=sampler, steps=0, count=count
                )  # fmt: skip
        found = []
        for m, split, clip in itertools.product(self.models, self.splits, self.clip_guidance):
            choices = itertools.product(m.samplers or self.samplers, m.steps or self.steps, m.guidance or self.guidance)
            for sampler, steps, guidance in choices:
                found.append(
                    Case(
                        model=m.name,
                        source=m.source,
                        split=split,
                        sampler=sampler,
                        steps=steps,
                        count=self.count(steps),
                        guidance=guidance,
                        clip_guidance=clip,
                        spacing=m.spacing,
                    )
                )
        yield from sorted(found, key=lambda case: case.steps)
