"""The one training loop. Methods are objectives and data, never another loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm import dist
from ldm.checkpoint import files
from ldm.data.resized import Sizes
from ldm.data.stream import Stream
from ldm.models.network import hidden
from ldm.objectives import Objective
from ldm.precision import measured
from ldm.rng import Rng, key
from ldm.train import guards, packages, state
from ldm.train.changes import Change, Record
from ldm.train.config import TrainConfig
from ldm.train.demand import Request
from ldm.train.ema import Ema
from ldm.train.engine import Engine
from ldm.train.guards import BadSamples, Spikes, Watchdog
from ldm.train.log import Log
from ldm.train.meter import Meter, StepFlops, peak
from ldm.train.packages import check_divided
from ldm.train.stop import AGAIN, Stop
from ldm.train.writer import CheckpointConfig, Job, Report, Writer, on_first

__all__ = ["AGAIN", "CheckpointConfig", "Hook", "Stop", "TrainConfig", "Trainer"]


class Hook(Protocol):
    """Something that happens beside training; called on all ranks."""

    every: int
    on_demand: bool
    """Whether it draws pictures, which a file `sample-now` in the run folder asks for."""

    def __call__(self, trainer: Trainer, step: int) -> None: ...


class Trainer:
    """Runs an objective over a loader, resumes from the run folder, and calls hooks.

    `record` is what the run is trained with, kept in every checkpoint; `changes` what of it is not as it was.
    """

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
        record: Record | None = None,
        changes: Sequence[Change] = (),
    ) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config, self.loader, self.out, self.seed, self.settings = config, loader, out, seed, settings
        self.record, self.changes = record, list(changes)
        self._guard = guard  # called on rank 0 right before it publishes; raises when the folder is no longer ours
        micro = config.micro_batch(dist.world_size())
        check_divided(config.optim.algorithm, config.engine, dist.world_size())
        names: dict[Tensor, str] = {p: name for name, p in objective.named_parameters()}
        optimizer = config.optim.build(objective.parameters(), hidden(objective.trained), names)
        self.objective = objective
        self.engine = Engine(objective, optimizer, config.engine, micro_batch=micro, accumulate=config.accumulate)
        self.ema = Ema(config.ema, self.engine.masters) if config.ema is not None else None
        self.checkpoints = out / "checkpoints"
        self.writer = Writer(guard, config.checkpoint.asynchronous)
        self.watchdog = Watchdog(config.guard.hang, out / "log")
        self.log: Log | None = None
        self.step = 0
        self.skipped = 0
        self.skipped_in_row = 0
        self.ahead = 0  # steps' data that were skipped after spikes: step n trains on the batch of step n + ahead
        self.rollbacks = 0
        self.sizes = Sizes(((0, config.batch),))  # of batches, by steps of the data as `ahead` counts them
        self.asked = False  # for pictures, by a file
        self._request = Request(out)
        self._ready = False
        self._seconds = 0.0  # of earlier starts
        self._spikes, self._bad = Spikes(config.guard), BadSamples(config.max_skipped)
        self._meter, self._flops = Meter(self.engine.device), StepFlops(objective.trained)
        self._peak = 0.0
        self._hosts: list[str] | None = None

    # --- checkpoints ------------------------------------------------------------------------------------------------
    def resume(self, step: int | None = None) -> int:
        """Continue from checkpoint `step` of the run folder, of none if it is -1; the number of steps done.

        None is the newest whole one. Raises ValueError when there are some and all are damaged.
        """
        if step is None:
            step = self._newest(None)
            if step < 0 and files.steps(self.checkpoints):
                raise ValueError(f"{self.checkpoints}: every checkpoint is damaged, so there is nothing to go on from")
        if step >= 0:
            self._load(step)
            dist.say(f"resuming from {self.checkpoints / f'step-{step}'} at step {self.step}")
            self._follow()
        self.objective.after_step(self.step)
        self._ready = True
        return self.step

    def _follow(self) -> None:
        """Go on at the same place of the data, which is counted in samples, also where the batch is another now."""
        before, place = self.sizes.parts[-1][1], self.step + self.ahead
        self.sizes = self.sizes.changed(place, self.config.batch)
        if before != self.config.batch:
            dist.say(
                f"batch {before} → {self.config.batch}: the data go on at sample {self.sizes.first(place)}; the rate's "
                "schedule and the averages count steps as before"
            )
        if len(self.sizes.parts) > 1:
            self.loader.follow(self.sizes.parts)

    def _newest(self, upto: int | None) -> int:
        """The step of the newest whole checkpoint, -1 without; ranks must not choose differently."""
        newest = files.newest(self.checkpoints, upto) if dist.rank() == 0 else None
        return dist.from_first(-1 if newest is None else files.step_of(newest))

    def _load(self, step: int) -> None:
        anew = any(c.key == "train.optim.algorithm" for c in self.changes)
        self.step, extra = state.load(self.checkpoints / f"step-{step}", self.engine, self.ema, anew=anew)
        if not self._ready:  # later, a rollback goes on in the data as they are read now
            self.sizes = Sizes(tuple((int(s), int(b)) for s, b in extra.get("batches", self.sizes.parts)))
        extra.pop("batches", None)
        was = extra.pop("computed_in", self._computed_in)
        if was != self._computed_in:
            dist.say(f"precision {was} → {self._computed_in}")
        self.skipped = int(extra.pop("skipped", 0))
        self.ahead = int(extra.pop("ahead", 0))
        self.rollbacks = int(extra.pop("rollbacks", 0))
        self._seconds = float(extra.pop("seconds", 0.0))
        self._spikes.load(extra.pop("spikes", {}))
        self.engine.load_scale(extra.pop("scale", {}))
        self.objective.load_state(extra)

    def save(self, now: bool = True) -> None:
        """Begin what is due at this step, a checkpoint if `now`; collective. It is published beside the steps after."""
        jobs, ema = [], self.ema
        if now or self.step % self.config.checkpoint.every == 0:
            keep = self.config.checkpoint
            jobs.append(Job(self.checkpoints, self._held(), keep.keep, keep.keep_every))
        if ema is not None and ema.powers and (not self.step % ema.config.snapshot if ema.config.snapshot else jobs):
            jobs.append(Job(self.out / "ema", state.hold_snapshot(self.step, self.engine, ema)))
        if jobs:
            self.writer.put(jobs)

    def save_best(self) -> None:
        """Keep this step's checkpoint as the best one so far, `best/step-N` in the run folder; collective."""
        self.writer.put([Job(self.out / "best", self._held(), keep=1)])

    def _held(self) -> state.Held:
        own = {
            "skipped": self.skipped,
            "ahead": self.ahead,
            "rollbacks": self.rollbacks,
            "seconds": 0.0 if self.log is None else self.log.seconds,
            "spikes": self._spikes.state(),
            "scale": self.engine.scale(),
            "batches": [list(part) for part in self.sizes.parts],
            "computed_in": self._computed_in,
        }
        return state.hold(self.step, self.engine, self.ema, self.objective.state() | own, self.record)

    @property
    def _computed_in(self) -> str:
        return str(self.engine.dtype).removeprefix("torch.")

    # --- the loop ---------------------------------------------------------------------------------------------------
    def run(self, hooks: list[Hook]) -> int:
        """Train to the configured number of steps; exit code 0, or `AGAIN` when a signal asked to stop.

        Raises FloatingPointError after `max_skipped` steps in a row whose loss or gradient was not finite, or after too
        many spikes; SaveFailed or LockLost, on all ranks, when a checkpoint could not be published.
        """
        if not self._ready:
            self.resume()
        self.log = log = Log(
            self.config.log,
            self.out / "log",
            start=self.step,
            steps=self.config.steps,
            settings=self.settings,
            before=self._seconds,
        )
        if (timed := measured()) is not None:
            told = {"choice": timed.choice, "fp32_ms": timed.fp32, "bf16_ms": timed.bf16}
            log.event(self.step, "precision", told)
        if self.changes:
            allowed = any(change.makes for change in self.changes)
            log.event(self.step, "changed", {"keys": [str(c) for c in self.changes], "allowed": allowed})
        if dist.rank() == 0:  # before the step's own memory is taken
            self._peak = self.config.log.peak * 1e12 or peak(self.engine.device, self.engine.dtype)
        stop = Stop()
        restore = stop.listen()
        try:
            with self.watchdog:
                return self._run(hooks, log, stop)
        except BaseException:
            self.writer.abandon()
            raise
        finally:
            log.close()
            restore()

    def _run(self, hooks: list[Hook], log: Log, stop: Stop) -> int:
        if self.step == 0 or self.step >= self.config.steps:  # the latter: killed after its last step
            self._call(hooks, first=True)
        batches = self.loader.batches(self.step + self.ahead)
        while self.step < self.config.steps:
            stopping, spike = self._one_step(batches, log, stop.asked)
            if spike and self._go_back(log):
                batches = self.loader.batches(self.step + self.ahead)
                continue
            last = self.step == self.config.steps
            self.save(last or stopping)
            if last or stopping:
                self.writer.finish()
            self.watchdog.beat(self.step)
            if stopping and not last:
                dist.say(f"asked to stop: saved step {self.step}; run the same command again to go on")
                return AGAIN
            self._call(hooks)
        self.writer.finish()
        return 0

    def _call(self, hooks: list[Hook], first: bool = False) -> None:
        for hook in hooks:
            due = self.step >= self.config.steps or (hook.every and (first or self.step % hook.every == 0))
            if due or (self.asked and hook.on_demand):
                hook(self, self.step)
                self.watchdog.beat(self.step)
        if self.asked:
            if not any(hook.on_demand for hook in hooks):
                dist.say("sample-now: nothing is drawn, as this kind of run has no sample pictures")
            self.asked = False
            self._request.done()

    def _one_step(self, batches: Any, log: Log, asked: bool = False) -> tuple[bool, bool]:
        """One optimizer step and what ranks agree on after it: whether to stop, and whether it completes a spike."""
        lr = self.config.optim.lr_at(self.step, self.config.steps)
        self.engine.set_lr(lr)
        sums, stepped = self._micro_batches(batches)
        self.step += 1
        if stepped and self.ema is not None:
            self.ema.update(self.engine.weights_to_use(), self.step)
        self.objective.after_step(self.step)
        self.watchdog.beat(self.step)
        self._meter.step()
        mine = self.writer.report()
        wants = float(self._request.there())
        asks, wants, *report, loss = dist.sums([float(asked), wants, *astuple(mine), float(sums["loss"])])
        self.asked = wants > 0
        self.writer.advance(Report(*report))
        self._count(stepped)
        if stepped and (self.step % self.config.log.every == 0 or self.step == 1):
            self._write_metrics(log, sums, {"lr": lr, "grad_norm": self.engine.grad_norm} | self._told())
        else:
            log.tick()
        return asks > 0, stepped and self._spikes.see(loss / dist.world_size())

    def _told(self) -> dict[str, float]:
        """What the engine and Prodigy have found: the loss scale, the step size that multiplies the rate."""
        estimate = self.engine.inner.param_groups[0].get("d")
        return self.engine.scale() | ({} if estimate is None else {"prodigy_d": float(estimate)})

    def _micro_batches(self, batches: Any) -> tuple[dict[str, Tensor], bool]:
        """Means of loss and metrics over this rank's micro-batches, and whether weights were updated."""
        sums: dict[str, Tensor] = {}
        keys: list[str] = []
        positions: list[int] = []
        stepped = False
        for _ in range(self.config.accumulate):
            batch = self._meter.next(batches)
            rng = Rng.of(self.seed, batch["position"])
            torch.manual_seed(key(self.seed, rng.positions[0], "dropout"))  # torch's dropout takes no generator
            if self._flops.total or self.config.engine.compile != "off":
                with self._meter.forward():
                    loss, metrics = self.engine.forward(batch, rng)
            else:
                with self._flops.counting():
                    loss, metrics = self.engine.forward(batch, rng)
            stepped = self.engine.backward_step(loss)
            keys += batch["key"]
            positions += rng.positions
            for name, value in {"loss": loss, **metrics}.items():
                share = value.detach().float() / self.config.accumulate
                sums[name] = sums[name] + share if name in sums else share
        if not stepped:
            self._bad.add(self.step + 1, keys, positions)
        return sums, stepped

    def _write_metrics(self, log: Log, sums: dict[str, Tensor], row: dict[str, float]) -> None:
        device = self.engine.device
        means = dist.mean(torch.stack([v.to(device) for v in sums.values()])).tolist()
        own, data, held = zip(*self._meter.read(), strict=True)
        row = dict(zip(sums, means, strict=True)) | row
        row |= {"data_seconds": max(data), "memory_gib": max(held)}
        if isinstance(self.loader, Stream):
            row |= self.loader.figures()
        if dist.world_size() > 1:
            row |= {"slowest_rank_seconds": max(own), "fastest_rank_seconds": min(own)}
            self._hosts = self._hosts or guards.hosts()
            found = guards.straggler(own, data, self._hosts, self.config.guard.straggler)
            if found is not None:
                dist.say(f"step {self.step}: {found}")
                log.event(self.step, "straggler", vars(found))
        log.step(self.step, row, self.config.batch, self._ideal_seconds())

    def _ideal_seconds(self) -> float:
        """Of a step at the peak rate of every rank; 0 where operations were not counted."""
        return self._flops.total * self.config.accumulate / self._peak if self._peak else 0.0

    # --- guards -----------------------------------------------------------------------------------------------------
    def _count(self, stepped: bool) -> None:
        """A loss or gradient that is not finite on any rank updated nothing anywhere: count it, stop after many."""
        self.skipped_in_row = 0 if stepped else self.skipped_in_row + 1
        if stepped:
            return
        self.skipped += 1
        keys = self._bad.rows[-1]["keys"]
        dist.say(f"step {self.step}: loss or gradient is not finite, skipped (samples {keys[:4]}...)")
        if self.skipped_in_row >= self.config.max_skipped:
            self.writer.finish()
            path = self._bad.write(self.out / "log")
            many = f"{self.skipped_in_row} times in a row"
            raise FloatingPointError(f"loss or gradient was not finite {many}; last samples {keys}; all in {path}")

    def _go_back(self, log: Log) -> bool:
        """After a spike: weights, averages and optimizer of the last checkpoint before it, and none of the data since.

        Whether there was one.
        """
        self.writer.finish()
        spiked, seen = self.step, self.step + self.ahead
        found = self._newest(spiked - self._spikes.high)
        if found < 0:
            self._spikes.high = 0
            dist.say(f"step {spiked}: the loss spikes, but there is no checkpoint before it: going on")
            return False
        count = self.rollbacks + 1
        if count > self.config.guard.rollbacks:
            raise FloatingPointError(f"step {spiked}: the loss spikes again after {self.rollbacks} rollbacks")
        self._load(found)
        self.rollbacks, self.ahead = count, seen - self.step
        self._spikes.high = 0
        on_first(lambda: self._withdraw(found))
        self.objective.after_step(self.step)
        log.rewind(self.step)
        log.event(self.step, "rollback", {"from": spiked, "ahead": self.ahead, "count": count})
        dist.say(f"step {spiked}: the loss spikes: back to step {self.step}, skipping the data of the steps between")
        return True

    def _withdraw(self, step: int) -> None:
        self._guard()
        for root in (self.checkpoints, self.out / "ema"):
            files.withdraw(root, step)

    def averaged(self) -> Any:
        """A context in which the network runs with its EMA weights (without EMA the raw ones, or schedule-free x)."""
        if self.ema is None:
            to_use = self.engine.weights_to_use()
            return self.engine.applied(to_use) if packages.is_schedule_free(self.engine.inner) else torch.no_grad()
        return self.engine.applied(self.ema.shards)

    def weights(self, averaged: bool = True) -> dict[str, Tensor]:
        """Whole trained weights on the CPU, without the objective's prefix `trained.`; collective."""
        shards = self.ema.shards if averaged and self.ema is not None else self.engine.weights_to_use()
        return {name.removeprefix("trained."): t for name, t in self.engine.full(shards)}
