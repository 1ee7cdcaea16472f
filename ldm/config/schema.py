"""The root of a run's config: composition only. Nobody below `cli` sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm import dist
from ldm.config import load as config
from ldm.config.earlier import EARLIER
from ldm.data.mixture import Data
from ldm.recipes import Task, check_validation
from ldm.recipes.models import with_usable
from ldm.recipes.optimizers import check_optimizer
from ldm.recipes.text_to_image import TextToImageTask, settled
from ldm.train.trainer import TrainConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run: `task` is the method, `data` what it sees, `train` the loop; `out` is the run folder."""

    name: str
    """The run's name; by default `out` is made of it."""
    out: Path
    seed: int = 0
    """Of all randomness: order of the data, noise, times, dropout, new weights."""
    workers: int = 0
    """Processes that read data beside each rank; 0 reads in the rank itself."""
    task: Task
    data: Data
    train: TrainConfig

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name must not be empty")
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")
        check_validation(self.task, self.train)
        check_optimizer(self.task, self.train)


def load_run(path: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a run's config, a file or plain data.

    Raises ValueError naming the key, the value and what is allowed. `data.kind` may be left out: what lists `sources`
    is a mixture; `task.network.kind` too: it is a U-Net. A checkpoint that stands for a model is written as one, and
    the network of `task.start` is filled in.
    """
    tree = config.read(path, overrides)
    data = tree.get("data")
    if isinstance(data, dict):
        data.setdefault("kind", "mixture" if "sources" in data else "shards")
    for old, new in EARLIER.items():
        if any(key == old or key.startswith((f"{old}.", f"{old}[")) for key in tree.earlier):
            dist.say(f"config: {old} is called {new} now, a choice by `kind`; it is read as such")
    task = tree.get("task")
    if isinstance(task, dict) and isinstance(task.get("network"), dict):
        task["network"].setdefault("kind", "unet")
    run = config.decode(RunConfig, tree)
    task = with_usable(run.task)
    return replace(run, task=settled(task) if isinstance(task, TextToImageTask) else task)
