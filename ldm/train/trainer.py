"""The one training loop. Methods are objectives and data, never another loop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm import dist
from ldm.checkpoint import files
from ldm.data.stream import Stream
from ldm.objectives import Objective
from ldm.rng import Rng
from ldm.train import state
from ldm.train.ema import Ema, EmaConfig
from ldm.train.engine import Engine, EngineConfig
from ldm.train.log import Log, LogConfig
from ldm.train.optim import Optim

AGAIN = 75
"""Exit code of a run that was told to stop, saved, and should be started again (EX_TEMPFAIL)."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """A checkpoint every `every` optimizer steps and at the end; the newest `keep` stay (0: all)."""

    every: int = 1000
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1 step, got {self.every}")
        if self.keep < 0:
            raise ValueError(f"keep must be at least 0, got {self.keep}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop: `steps` optimizer steps, each over `batch` samples on all ranks together."""

    steps: int
    batch: int
    accumulate: int = 1
    optim: Optim = field(default_factory=Optim)
    engine: EngineConfig = field(default_factory=EngineConfig)
    ema: EmaConfig | None = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    threads: int = 0
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


class Hook(Protocol):
    """Something that happens beside training; called on all ranks."""

    every: int

    def __call__(self, trainer: Trainer, step: int) -> None: ...


class Stop:
    """Whether a signal asked to stop; the flag is agreed on by all ranks at a step boundary."""

    def __init__(self) -> None:
        self.asked = False

    def listen(self) -> Callable[[], None]:
        """Catch SIGTERM, SIGINT and SIGUSR2; the returned call restores the old handlers."""
        if threading.current_thread() is not threading.main_thread():
            return lambda: None
        names = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
        old = {s: signal.signal(s, self._handle) for s in names}

        def restore() -> None:
            for number, handler in old.items():
                signal.signal(number, handler)

        return restore

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


class Trainer:
    """Runs an objective over a loader, resumes from the run folder, and calls hooks."""

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        loader: Stream[Any],
        out: Path,
        *,
        seed: int,
        settings: Any,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config, self.loader, self.out, self.seed, self.settings = config, loader, out, seed, settings
        self._guard = guard  # called on rank 0 right before it publishes; raises when the folder is no longer ours
        micro = config.micro_batch(dist.world_size())
        optimizer = config.optim.build(objective.parameters())
        self.objective = objective
        self.engine = Engine(objective, optimizer, config.engine, micro_batch=micro, accumulate=config.accumulate)
        objective.bind(self.engine.whole)
        self.ema = Ema(config.ema, self.engine.masters) if config.ema is not None else None
        self.checkpoints = out / "checkpoints"
        self.step = 0
        self.skipped = 0
        self.skipped_in_row = 0

    def resume(self) -> int:
        """Continue from the newest whole checkpoint of the run folder; the number of steps done."""
        newest = files.newest(self.checkpoints) if dist.rank() == 0 else None
        step = dist.from_first(-1 if newest is None else files.step_of(newest))  # ranks must not choose differently
        if step >= 0:
            folder = self.checkpoints / f"step-{step}"
            self.step, extra = state.load(folder, self.engine, self.ema)
            self.skipped = int(extra.pop("skipped", 0))
            self.objective.load_state(extra)
            dist.say(f"resuming from {folder} at step {self.step}")
        self.objective.after_step(self.step)
        return self.step

    def save(self) -> None:
        """Publish a checkpoint of this step; collective."""
        extra = self.objective.state() | {"skipped": self.skipped}
        state.save(self.checkpoints, self.step, self.engine, self.ema, extra, self.config.checkpoint.keep, self._guard)

    def run(self, hooks: list[Hook]) -> int:
        """Train to the configured number of steps; exit code 0, or `AGAIN` when a signal asked to stop.

        Raises FloatingPointError after `max_skipped` steps in a row whose loss or gradient was not finite.
        """
        self.resume()
        if self.step == 0 or self.step >= self.config.steps:  # the latter: killed after its last step
            self._call(hooks, first=True)
        stop = Stop()
        restore = stop.listen()
        log = Log(self.config.log, self.out / "log", start=self.step, steps=self.config.steps, settings=self.settings)
        saved = self.step
        try:
            batches = self.loader.batches(self.step)
            while self.step < self.config.steps:
                self._one_step(batches, log)
                last = self.step == self.config.steps
                stopping = dist.any_rank(stop.asked)
                if last or stopping or self.step % self.config.checkpoint.every == 0:
                    self.save()
                    saved = self.step
                if stopping and not last:
                    dist.say(f"asked to stop: saved step {saved}; run the same command again to go on")
                    return AGAIN
                self._call(hooks)
        finally:
            log.close()
            restore()
        return 0

    def _call(self, hooks: list[Hook], first: bool = False) -> None:
        for hook in hooks:
            if self.step >= self.config.steps or (hook.every and (first or self.step % hook.every == 0)):
                hook(self, self.step)

    def _one_step(self, batches: Any, log: Log) -> None:
        lr = self.config.optim.lr_at(self.step, self.config.steps)
        self.engine.set_lr(lr)
        sums: dict[str, Tensor] = {}
        keys: list[str] = []
        stepped = False
        for _ in range(self.config.accumulate):
            batch = next(batches)
            loss, metrics = self.engine.forward(batch, Rng.of(self.seed, batch["position"]))
            stepped = self.engine.backward_step(loss)
            keys += batch["key"]
            for name, value in {"loss": loss, **metrics}.items():
                sums[name] = sums.get(name, torch.zeros(())) + value.detach().float().cpu() / self.config.accumulate
        self.step += 1
        if stepped and self.ema is not None:
            self.ema.update(self.engine.masters, self.step)
        self.objective.after_step(self.step)
        self._count(stepped, keys)
        if stepped and (self.step % self.config.log.every == 0 or self.step == 1):
            means = dist.mean(torch.stack(list(sums.values())).to(self.engine.device)).tolist()
            row = dict(zip(sums, means, strict=True)) | {"lr": lr, "grad_norm": self.engine.grad_norm}
            log.step(self.step, row, self.config.batch)
        else:
            log.tick()

    def _count(self, stepped: bool, keys: list[str]) -> None:
        """A loss or gradient that is not finite on any rank updated nothing anywhere: count it, stop after many."""
        self.skipped_in_row = 0 if stepped else self.skipped_in_row + 1
        if stepped:
            return
        self.skipped += 1
        dist.say(f"step {self.step}: loss or gradient is not finite, skipped (samples {keys[:4]}...)")
        if self.skipped_in_row >= self.config.max_skipped:
            raise FloatingPointError(
                f"loss or gradient was not finite {self.skipped_in_row} times in a row; last samples {keys}"
            )

    def averaged(self) -> Any:
        """A context in which the network runs with its EMA weights (or the raw ones without EMA)."""
        if self.ema is None:
            return torch.no_grad()
        return self.engine.applied(self.ema.shards)

    def weights(self, averaged: bool = True) -> dict[str, Tensor]:
        """Whole trained weights on the CPU, without the objective's prefix `trained.`; collective."""
        shards = self.ema.shards if averaged and self.ema is not None else self.engine.masters
        return {name.removeprefix("trained."): t for name, t in self.engine.full(shards)}
