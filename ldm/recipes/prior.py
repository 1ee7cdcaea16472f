"""Class pictures for prior preservation: made by the base model on all ranks, counted, and used again."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from ldm import dist
from ldm.checkpoint import files
from ldm.config.load import encode
from ldm.data.bad import BadSample
from ldm.data.grid import to_pil
from ldm.data.sources import candidates
from ldm.pipeline import Settings, TextToImage
from ldm.progress import Bar
from ldm.recipes.pictures import Entry, entries, is_set, of_item, on_first

_PREFIX = "class-"


@dataclass(frozen=True, kw_only=True)
class Prior:
    """`count` pictures of `prompt` (default: "a NOUN") keep the model's idea of the class (DreamBooth, section 3.2).

    They are drawn with `settings` into `folder` (default: `class` in the run folder); pictures that are there already
    count, whoever made them, if they can be read and wherever `ldm data build` would find them. A built set is used as
    it is.
    """

    prompt: str | None = None
    count: int = 100
    folder: Path | None = None
    settings: Settings = field(default_factory=lambda: Settings(sampler="dpmpp_2m", steps=25, guidance=3.0))

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")


def make(prior: Prior, prompt: str, folder: Path, base: str, pipeline: TextToImage) -> None:
    """Draw the class pictures that are missing; collective. Picture i has noise of its own, whichever rank draws it.

    Raises ValueError when the folder holds pictures of another prompt, model or setting.
    """
    if is_set(folder):
        there = len(entries(folder))
        dist.say(f"class pictures: the {there} of {folder}" + (f", not {prior.count}" if there < prior.count else ""))
        return
    record = {"prompt": prompt, "base": base, "settings": encode(prior.settings)}
    on_first(lambda: _claim(folder, record))
    missing = _missing(folder, prior.count)
    mine = missing[dist.rank() :: dist.world_size()]
    if missing:
        dist.say(f"class pictures: {prior.count - len(missing)} found, drawing {len(missing)} of {prompt!r}")
    size = prior.settings.batch
    dist.barrier()  # so that no rank counts what another has begun to draw
    with Bar("class pictures", "pictures", len(mine)) as bar:
        for k in range(0, len(mine), size):
            chosen = mine[k : k + size]
            images = pipeline.sample([prompt] * len(chosen), settings=prior.settings, indices=chosen)
            for i, picture in zip(chosen, to_pil(images), strict=True):
                beside = folder / f".{_PREFIX}{i:05d}.{os.getpid()}"
                picture.save(beside, "PNG")
                os.replace(beside, folder / f"{_PREFIX}{i:05d}.png")
            bar.update(len(chosen))
    dist.barrier()


def _missing(folder: Path, count: int) -> list[int]:
    """Numbers of the pictures to draw so that the folder holds `count` that can be read."""
    there = {item.name for item in candidates(folder, "none") if _opens(of_item(item))}
    own = {i for i in range(count) if f"{_PREFIX}{i:05d}.png" in there}
    others = sum(not name.startswith(_PREFIX) for name in there)
    return [i for i in range(count - others) if i not in own]


def _opens(entry: Entry) -> bool:
    try:
        entry.open(at_least=(64, 64))
    except BadSample:
        return False
    return True


def _claim(folder: Path, record: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "class.json"
    if not note.is_file():
        files.write_text(note, json.dumps(record, indent=1))
    elif (old := json.loads(note.read_text(encoding="utf-8"))) != record:
        odd = sorted(k for k in record if old.get(k) != record[k])
        raise ValueError(f"{folder}: holds class pictures of other {', '.join(odd)}: {old.get(odd[0])!r}; take another")


def to_draw(prior: Prior, folder: Path) -> int:
    """How many class pictures are not there yet."""
    if is_set(folder):
        return 0
    return len(_missing(folder, prior.count)) if folder.is_dir() else prior.count
