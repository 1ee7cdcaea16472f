"""The latents and text states that all runs share, encoded once."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.quality.rows import Recipe
from ldm.checkpoint.lock import RunLock, RunLocked
from ldm.config.load import encode
from ldm.data.mixture import main_source

ORDER = ("captions", "shuffle", "window", "last", "memory", "max_bad", "quarantine", "remote", "repeats")
"""Settings of data that say which samples a batch has, not what is cached of them."""


def folder_of(out: Path, recipe: Recipe) -> Path:
    """Recipes with the same data and frozen parts have the same."""
    told = {k: v for k, v in encode(recipe.run.data).items() if k not in ORDER}
    told |= {"vae": recipe.task.vae, "text": recipe.task.text, "padding": recipe.task.t5_padding}
    name = hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=6).hexdigest()
    return out / "cache" / f"{Path(main_source(recipe.run.data).path).name}-{name}"


@contextmanager
def alone(cache: Path) -> Iterator[None]:
    """While a cache may be written, one process at a time; others wait. Nobody does for one that is whole."""
    if (cache / "manifest.json").is_file():
        yield
        return
    lock = RunLock(cache.with_name(f"{cache.name}.lock"))
    while True:
        try:
            lock.acquire()
            break
        except RunLocked:
            time.sleep(1.0)
    try:
        yield
    finally:
        lock.release()
