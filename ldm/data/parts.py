"""The work of a cache, cut into parts of consecutive samples that any number of processes share."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ldm.data.captions import check_template
from ldm.data.images import Fit
from ldm.data.manifest import Manifest
from ldm.data.pairs import Pair, check_pairs, is_random


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """What is cached. `variants` pictures a sample are drawn by crop and flip (the first is plain).

    With `buckets` pictures have the shapes of the data set's buckets, and `size` is not used. Without
    `require_captions` a sample that has no caption is kept, with the empty text. `pairs` are stored as latents or as
    uint8 pictures, as each says; random masks are drawn once for each variant.
    """

    path: str
    splits: tuple[str, ...] = ("train",)
    size: int = 64
    buckets: bool = False
    fit: Fit = "crop"
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    variants: int = 1
    template: str = "{}"
    trigger: str = ""
    require_captions: bool = True
    pairs: dict[str, Pair] = field(default_factory=dict)
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    seed: int = 0
    batch: int = 64
    part: int = 2048

    def __post_init__(self) -> None:
        if min(self.size, self.variants, self.batch, self.part) < 1:
            raise ValueError("size, variants, batch and part must be at least 1")
        check_pairs(self.pairs)
        if self.variants > 1 and self.crop == "center" and not self.flip and not is_random(self.pairs):
            raise ValueError(f"variants: {self.variants} would all be equal with crop=center and flip=false")
        check_template(self.template)


@dataclass
class Part:
    """Samples `start` to `stop` of a split, all of one shape and number of repeats."""

    split: str
    number: int
    start: int
    stop: int
    bucket: tuple[int, int] | None
    repeats: int

    @property
    def prefix(self) -> str:
        """What its files' names begin with."""
        return f"{self.split}-p{self.number:05d}"


def parts_of(config: EncodeConfig, source: Manifest, split: str) -> list[Part]:
    """Runs of shards of one shape and number of repeats, each cut into parts."""
    found: list[Part] = []
    start = 0
    shards = source.split(split)
    for (bucket, repeats), run in itertools.groupby(
        shards, lambda s: (s.bucket if config.buckets else None, s.repeats)
    ):
        stop = start + sum(s.samples for s in run)
        for first in range(start, stop, config.part):
            found.append(Part(split, len(found), first, min(first + config.part, stop), bucket, repeats))
        start = stop
    return found


def marker(out: Path, part: Part) -> Path:
    """The file that says that a part is whole."""
    return out / f"{part.prefix}.done.json"
