"""The training log: a progress bar, `metrics.jsonl`, TensorBoard and, by config, Weights & Biases."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from ldm import dist
from ldm.progress import Bar


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Metrics are written every `every` optimizer steps.

    `price` of one GPU (or process) for an hour, in whatever currency, adds the cost so far. `peak` in TFLOP/s is what
    utilisation is told against; 0 measures a matrix product at the start. `wandb` needs the extra ldm[wandb]; its mode
    "offline" writes to the log folder, for `wandb sync` later; None is what WANDB_MODE says.
    """

    every: int = 10
    tensorboard: bool = True
    """Whether metrics are written for TensorBoard, too."""
    wandb: bool = False
    wandb_mode: Literal["online", "offline"] | None = None
    """Whether wandb sends its log or only writes it; null is what WANDB_MODE says."""
    price: float = 0.0
    peak: float = 0.0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1 step, got {self.every}")
        for name, value in (("price", self.price), ("peak", self.peak)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")


def memory() -> float:
    """Memory in use in GiB: the device's peak on a GPU, the resident set on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30


class Log:
    """Rank 0 writes; other ranks pass through.

    `before`: seconds that earlier starts of the run took, for the cost.
    """

    def __init__(
        self, config: LogConfig, folder: Path, *, start: int, steps: int, settings: Any, before: float = 0.0
    ) -> None:
        self.config, self.folder, self.steps = config, folder, steps
        self.main = dist.rank() == 0
        self._began, self._before = time.monotonic(), before
        self._last = self._first = (self._began, start)
        self._bar: Bar | None = None
        if not self.main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._open(start)
        self._wandb: Any = _wandb(config, folder, settings) if config.wandb else None
        self._bar = Bar("training", "steps", steps, start=start)

    def _open(self, start: int) -> None:
        self._lines = _continued(self.folder / "metrics.jsonl", start)
        self._board: Any = None
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder), purge_step=start)

    @property
    def seconds(self) -> float:
        """Of all starts of the run together."""
        return self._before + time.monotonic() - self._began

    def rewind(self, step: int) -> None:
        """Forget the steps after `step`, which are about to run again."""
        if not self.main:
            return
        assert self._bar is not None
        self._lines.close()
        if self._board is not None:
            self._board.close()
        self._open(step)
        self._bar.to(step)
        self._last = self._first = (time.monotonic(), step)

    def step(self, step: int, metrics: Mapping[str, float], images: int, flops: float = 0.0) -> None:
        """After optimizer step number `step` (from 1); `images` is the global batch, `flops` those of one step over the
        peak of all ranks together, in seconds: 0 leaves utilisation out."""
        if not self.main:
            return
        assert self._bar is not None
        now = time.monotonic()
        elapsed, done = now - self._last[0], step - self._last[1]
        rate = done * images / max(elapsed, 1e-9)
        self._last = (now, step)
        pace = (now - self._first[0]) / max(step - self._first[1], 1)
        row = dict(metrics) | {"images_per_second": rate, "seconds": now - self._began}
        row.setdefault("memory_gib", memory())
        row["seconds_left"] = pace * (self.steps - step)
        if flops:
            row["utilisation"] = flops * done / max(elapsed, 1e-9)
        if self.config.price:
            row["cost"] = self.config.price * dist.world_size() * self.seconds / 3600
        self._bar.note(
            " ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k in ("loss", "lr"))
            + f" {rate:.1f} img/s {row['memory_gib']:.1f} GiB"
        )
        self._bar.update(1)
        self.write(step, row)

    def event(self, step: int, what: str, details: Mapping[str, Any]) -> None:
        """One line of `events.jsonl`: what happened that is no metric."""
        if self.main:
            with (self.folder / "events.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "event": what, **details}, ensure_ascii=False) + "\n")

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


def _wandb(config: LogConfig, folder: Path, settings: Any) -> Any:
    """A run of Weights & Biases that a later start goes on with."""
    try:
        import wandb  # pyright: ignore[reportMissingImports] (an extra)
    except ImportError:
        raise ValueError("train.log.wandb: needs the package wandb: pip install 'ldm[wandb]'") from None
    name = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
    return wandb.init(dir=str(folder), config={"run": settings}, id=name, resume="allow", mode=config.wandb_mode)


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
