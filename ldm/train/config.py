"""The settings of the loop and of what happens in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ldm.train.ema import EmaConfig
from ldm.train.engine_config import EngineConfig
from ldm.train.guards import GuardConfig
from ldm.train.log import LogConfig
from ldm.train.optim import Optim
from ldm.train.writer import CheckpointConfig


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """Every `every` steps the loss of the averaged weights on the first `samples` of the data's split `split`.

    With `images`, a folder of pictures or a built data set, on these instead, prepared in the folder `path`; with
    `share` on so many of the pictures of the task's own folder, which are then not trained on. `keep_best` keeps the
    checkpoint of the lowest loss in the run's folder `best`.

    `times`: so many fixed times t/T = 0, 1/n .. (n-1)/n, which samples take in turn (MLPerf's way has 8); 0: each
    sample has a time of its own, drawn once as training draws.
    """

    split: str = "test"
    samples: int = 256
    every: int = 1000
    times: int = 0
    images: Path | None = None
    path: Path | None = None
    share: float = 0.0
    keep_best: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        if self.every < 0:
            raise ValueError(f"every must be at least 0 steps (0: at the end only), got {self.every}")
        if not 0 <= self.times <= self.samples:
            raise ValueError(f"times must be between 0 (drawn) and samples {self.samples}, got {self.times}")
        if not 0 <= self.share < 1:
            raise ValueError(f"share must be in [0, 1), got {self.share}")
        if self.share and self.images is not None:
            raise ValueError(f"share: {self.share} of its own pictures, and images {str(self.images)!r}: one of both")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop: `steps` optimizer steps, each over `batch` samples on all ranks together.

    After `max_skipped` steps in a row whose loss or gradient was not finite the run stops.
    """

    steps: int
    batch: int
    accumulate: int = 1
    """Parts that each process divides its share of `batch` into, one after another."""
    optim: Optim = field(default_factory=Optim)
    engine: EngineConfig = field(default_factory=EngineConfig)
    ema: EmaConfig | None = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    validate: ValidateConfig | None = None
    threads: int = 0
    """Threads that PyTorch computes with on a CPU; 0 leaves its own number."""
    max_skipped: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def micro_batch(self, world: int) -> int:
        """Samples of one forward on one rank. Raises ValueError when the batch does not divide."""
        parts = world * self.accumulate
        if self.batch % parts:
            how = f"{world} processes x accumulate {self.accumulate}"
            raise ValueError(f"train.batch: {self.batch} does not divide by {parts} ({how})")
        return self.batch // parts
