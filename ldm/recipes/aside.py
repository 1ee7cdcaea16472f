"""An earlier run's files out of the way of one that begins anew in the same folder: kept, and put back if it fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm import dist
from ldm.train.writer import on_first

OF_A_RUN = (
    "checkpoints", "ema", "exports", "log", "samples", "export", "config.yaml", "done.json", "page.html",
    "pictures.png", "run.html",
)  # fmt: skip
"""What a run writes into its folder, beside data and caches."""
CLASS_PICTURES = "class_pictures"
"""Drawn by the base model, whichever run asked for them: they stay."""


@contextmanager
def set_aside(out: Path, data: bool, guard: Callable[[], None]) -> Iterator[None]:
    """What an earlier run wrote is in `out/earlier-N` inside and afterwards, or back again if what is inside fails.

    With `data` also the shards and the cache that its recipe made of pictures. Collective.
    """
    names = [name for name in OF_A_RUN if (out / name).exists()]
    if data and (out / "data").is_dir():
        names += [f"data/{p.name}" for p in sorted((out / "data").iterdir()) if p.name != CLASS_PICTURES]
    if data and (out / "cache").is_dir():
        names.append("cache")
    number = 1
    while (out / f"earlier-{number}").exists():
        number += 1
    aside = out / f"earlier-{number}"

    def move(source: Path, target: Path) -> None:
        guard()
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if (target / name).exists():  # what the start that failed had begun
                shutil.rmtree(target / name)
            (source / name).rename(target / name)

    on_first(lambda: move(out, aside))
    try:
        yield
    except BaseException:
        if dist.rank() == 0:
            move(aside, out)
            shutil.rmtree(aside, ignore_errors=True)
        raise
    if names:
        dist.say(f"{out}: begins at step 0; what was there is in {aside}")
