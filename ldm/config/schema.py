"""The root of a run's config: composition only. Nobody below `cli` sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.config import load as config
from ldm.data.mixture import Data
from ldm.recipes.autoencoder import AutoencoderTask
from ldm.recipes.clip import ClipTask
from ldm.recipes.distill import DistillTask
from ldm.recipes.dreambooth import DreamboothTask
from ldm.recipes.finetune import FinetuneTask
from ldm.recipes.inversion import InversionTask
from ldm.recipes.text_to_image import TextToImageTask
from ldm.train.trainer import TrainConfig

Task = AutoencoderTask | ClipTask | DistillTask | DreamboothTask | FinetuneTask | InversionTask | TextToImageTask


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run: `task` is the method, `data` what it sees, `train` the loop; `out` is the run folder."""

    name: str
    out: Path
    seed: int = 0
    workers: int = 0
    task: Task
    data: Data
    train: TrainConfig

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name must not be empty")
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")


def load_run(path: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a run's config, a file or plain data.

    Raises ValueError naming the key, the value and what is allowed.
    `data.kind` may be left out: what lists `sources` is a mixture.
    """
    tree = config.read(path, overrides)
    data = tree.get("data")
    if isinstance(data, dict):
        data.setdefault("kind", "mixture" if "sources" in data else "shards")
    return config.decode(RunConfig, tree)
