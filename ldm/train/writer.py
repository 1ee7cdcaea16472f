"""Checkpoints written beside training: it waits for the copy to host memory, not for the disk.

A thread of each rank writes, hashes and syncs its own files and does nothing collective. At the step boundaries, where
the ranks exchange flags anyway, they learn that all have written; then rank 0's thread publishes. So a checkpoint of
which one rank's part is missing never gets its name.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ldm import dist
from ldm.checkpoint import files
from ldm.checkpoint.lock import LockLost
from ldm.train import state
from ldm.train.state import Held


class SaveFailed(OSError):
    """A checkpoint could not be written; the ones before it are whole."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """A checkpoint every `every` optimizer steps and at the end; the newest `keep` stay (0: all).

    Those of steps that `keep_every` divides stay for good (0: none). `asynchronous` writes them beside training, from
    host memory; otherwise training waits for the disk.
    """

    every: int = 1000
    keep: int = 2
    keep_every: int = 0
    asynchronous: bool = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1 step, got {self.every}")
        for name, value in (("keep", self.keep), ("keep_every", self.keep_every)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if self.keep_every % self.every:
            raise ValueError(f"keep_every: {self.keep_every} is not a multiple of every {self.every}")


def _fail(error: BaseException | None, what: str, lost: bool) -> NoReturn:
    """Raise this rank's error, or that another one has it."""
    if isinstance(error, LockLost):
        raise error
    if error is not None:
        raise SaveFailed(f"{what} could not be written: {error}") from error
    raise (LockLost if lost else SaveFailed)(f"{what} could not be published: another rank tells why")


def on_first(act: Callable[[], object]) -> None:
    """Do something on rank 0, and raise on all ranks what it raises there; collective."""
    error: BaseException | None = None
    if dist.rank() == 0:
        try:
            act()
        except (LockLost, OSError) as caught:
            error = caught
    lost = isinstance(error, LockLost)
    failed, lost_anywhere = dist.sums([float(error is not None), float(lost)])
    if failed:
        _fail(error, "the run folder", bool(lost_anywhere))


@dataclass(frozen=True)
class Report:
    """What a rank tells at a step boundary, to be added up over ranks: whether it still writes, or could not."""

    busy: float
    failed: float
    lost: float


@dataclass(frozen=True)
class Job:
    """This rank's part of a folder `root/step-N` to be published, and which ones stay beside it."""

    root: Path
    held: Held
    keep: int = 0
    keep_every: int = 0


class Writer:
    """What was put last is written beside training; every method but `report` and `abandon` is collective.

    `guard` is called on rank 0 right before it publishes and raises LockLost when the folder is no longer its own.
    """

    def __init__(self, guard: Callable[[], None], asynchronous: bool) -> None:
        self._guard, self._asynchronous = guard, asynchronous
        self._jobs: list[Job] = []
        self._stage = ""  # of the jobs: "" none, "write", "publish"
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def put(self, jobs: list[Job]) -> None:
        """Begin to write; waits for what was put before."""
        self.finish()
        on_first(lambda: [state.prepare(job.root, job.held.step) for job in jobs])
        self._jobs = jobs
        self._start("write")
        if not self._asynchronous:
            self.finish()

    def report(self) -> Report:
        """This rank's part of the exchange."""
        busy = self._thread is not None and self._thread.is_alive()
        lost = isinstance(self._error, LockLost)
        return Report(float(busy), float(self._error is not None and not lost), float(lost))

    def advance(self, total: Report) -> None:
        """Go on, given the sum of all ranks' reports; raises what went wrong on any of them, on all."""
        self._raise(total)
        if not self._stage or total.busy:
            return
        self._join()
        if self._stage == "write":
            self._start("publish")
        else:
            self._stage, self._jobs = "", []

    def _raise(self, total: Report) -> None:
        if not (total.failed or total.lost):
            return
        self._join()
        error, step = self._error, self._jobs[0].held.step
        self._stage, self._jobs, self._error = "", [], None
        _fail(error, f"checkpoint of step {step}", bool(total.lost))

    def finish(self) -> None:
        """Wait until everything that was put is published; raises what went wrong on any rank, on all."""
        while self._stage:
            self._join()
            mine = self.report()
            self.advance(Report(*dist.sums([mine.busy, mine.failed, mine.lost])))

    def abandon(self) -> None:
        """Wait for this rank's thread alone, when the ranks no longer agree; not collective."""
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _start(self, stage: str) -> None:
        self._stage = stage
        act = self._write if stage == "write" else self._publish
        if stage == "publish" and dist.rank() != 0:
            return
        self._thread = threading.Thread(target=self._guarded, args=(act,), name=f"checkpoint-{stage}")
        self._thread.start()

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            self._error = error

    def _write(self) -> None:
        for job in self._jobs:
            state.write(job.held, files.staging(job.root, job.held.step))

    def _publish(self) -> None:
        for job in self._jobs:
            state.publish(job.root, job.held.step, job.keep, job.keep_every, self._guard)
