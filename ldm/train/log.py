"""The training log: a progress bar, `metrics.jsonl`, TensorBoard and, by config, Weights & Biases."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from ldm import dist


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Metrics are written every `every` optimizer steps."""

    every: int = 10
    tensorboard: bool = True
    wandb: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1 step, got {self.every}")


def memory() -> float:
    """Memory in use in GiB: the device's peak on a GPU, the resident set on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30


class Log:
    """Rank 0 writes; other ranks pass through."""

    def __init__(self, config: LogConfig, folder: Path, *, start: int, steps: int, settings: Any) -> None:
        self.config, self.start, self.steps = config, start, steps
        self.main = dist.rank() == 0
        self._began = time.monotonic()
        self._last = (self._began, start)
        self._bar: tqdm[Any] | None = None
        if not self.main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = _continued(folder / "metrics.jsonl", start)
        self._board: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder), purge_step=start)
        self._wandb: Any = None
        if config.wandb:
            import wandb  # pyright: ignore[reportMissingImports] (an extra)

            name = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()  # so that a run resumes
            self._wandb = wandb.init(dir=str(folder), config={"run": settings}, id=name, resume="allow")
        shown = sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, mininterval=0.5 if shown else 15)

    def step(self, step: int, metrics: Mapping[str, float], images: int) -> None:
        """After optimizer step number `step` (from 1); `images` is the global batch."""
        if not self.main:
            return
        assert self._bar is not None
        self._bar.update(1)
        now = time.monotonic()
        elapsed, done = now - self._last[0], step - self._last[1]
        rate = done * images / max(elapsed, 1e-9)
        self._last = (now, step)
        row = dict(metrics) | {"images_per_second": rate, "memory_gib": memory(), "seconds": now - self._began}
        self._bar.set_postfix_str(
            " ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k in ("loss", "lr"))
            + f" {rate:.1f} img/s {row['memory_gib']:.1f} GiB"
        )
        self.write(step, row)

    def tick(self) -> None:
        """A step whose metrics are not written."""
        if self._bar is not None:
            self._bar.update(1)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """One line of `metrics.jsonl`, and the same to the boards."""
        if not self.main:
            return
        clean = {k: v if math.isfinite(v) else str(v) for k, v in row.items()}
        self._lines.write(json.dumps({"step": step, **clean}) + "\n")
        self._lines.flush()
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(row), step=step)

    def close(self) -> None:
        """Flush everything."""
        if not self.main:
            return
        assert self._bar is not None
        self._bar.close()
        self._lines.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _continued(path: Path, start: int) -> Any:
    """The metrics file opened for appending, without lines of steps that are about to run again."""
    if path.exists():
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= start:
                    kept.append(line)
            except (ValueError, KeyError):
                continue  # a line cut short by a crash belongs to a step that runs again
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        beside.replace(path)
    return path.open("a", encoding="utf-8")
