"""What watches a run: samples that are not finite, spikes of the loss, steps that hang, ranks that lag behind."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm import dist

HUNG = 70
"""Exit code of a run that made no step for too long (EX_SOFTWARE); every rank's stack is in the log."""
LOST = 73
"""Exit code of a run whose folder another process took over (EX_CANTCREAT)."""
UNSAVED = 74
"""Exit code of a run that could not write a checkpoint (EX_IOERR); the ones before it are whole."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """`spike`: go back to the last good checkpoint when the loss of `patience` steps in a row is above `spike` times
    the median of the `window` steps before (0: off). The data of the steps since that checkpoint are skipped, nothing
    else changes; after `rollbacks` of them the next spike stops the run.

    `hang`: seconds without a step after which every rank prints its stack and exits with code 70 (0: off). `straggler`:
    a rank whose own time per step is above so many times the median is named (0: off).
    """

    spike: float = 0.0
    patience: int = 1
    window: int = 100
    rollbacks: int = 3
    hang: float = 1800.0
    straggler: float = 1.5

    def __post_init__(self) -> None:
        if self.spike and not self.spike > 1:
            raise ValueError(f"spike must be above 1 (or 0: off), got {self.spike}")
        for name, least in (("patience", 1), ("window", 4), ("rollbacks", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.hang < 0:
            raise ValueError(f"hang must be at least 0 seconds (0: off), got {self.hang}")
        if self.straggler and not self.straggler > 1:
            raise ValueError(f"straggler must be above 1 (or 0: off), got {self.straggler}")


class Spikes:
    """Finds spikes in the losses of successive steps; the same on all ranks, since it sees global means alone."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._calm: deque[float] = deque(maxlen=config.window)
        self.high = 0

    def see(self, loss: float) -> bool:
        """Whether this step completes a spike. Losses of a spike do not enter the median."""
        if not self.config.spike:
            return False
        enough = len(self._calm) >= max(4, self.config.window // 4)
        if enough and loss > self.config.spike * statistics.median(self._calm):
            self.high += 1
            return self.high >= self.config.patience
        self.high = 0
        self._calm.append(loss)
        return False

    def state(self) -> dict[str, Any]:
        """For the checkpoint: JSON values."""
        return {"calm": list(self._calm), "high": self.high}

    def load(self, state: dict[str, Any]) -> None:
        """Undo `state`."""
        self._calm = deque(state.get("calm", []), maxlen=self.config.window)
        self.high = int(state.get("high", 0))


class Watchdog:
    """A thread that ends the process when no `beat` came for `seconds`, after writing all stacks.

    They go to standard error and to `folder/stacks-RANK.txt`. Each rank watches itself: when one hangs, all soon wait
    for it, and each tells where. Between stacks and exit it waits up to 5 seconds, so that every rank gets to write.
    """

    def __init__(self, seconds: float, folder: Path, exit: Callable[[int], None] = os._exit) -> None:
        self.seconds, self.folder, self._exit = seconds, folder, exit
        self._last = time.monotonic()
        self._step = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self.seconds:
            self._last = time.monotonic()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def beat(self, step: int) -> None:
        """Sign of life."""
        self._last, self._step = time.monotonic(), step

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 8)):
            if time.monotonic() - self._last <= self.seconds:
                continue
            self._tell()
            if not self._stop.wait(min(5.0, self.seconds / 2)) and time.monotonic() - self._last > self.seconds:
                self._exit(HUNG)
                return

    def _tell(self) -> None:
        head = (
            f"rank {dist.rank()} on {socket.gethostname()}: no step for {self.seconds:g} s after step {self._step}; "
            f"stacks of all threads:\n"
        )
        sys.stderr.write(head)
        sys.stderr.flush()
        with contextlib.suppress(OSError, ValueError):  # a standard error that is no file
            faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        with contextlib.suppress(OSError), (self.folder / f"stacks-{dist.rank()}.txt").open("w") as file:
            file.write(head)
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
            os.fsync(file.fileno())


class BadSamples:
    """Keeps the samples of recent steps that were not finite, and writes them when the run stops because of them."""

    def __init__(self, most: int) -> None:
        self.rows: deque[dict[str, Any]] = deque(maxlen=most)

    def add(self, step: int, keys: Sequence[str], positions: Sequence[int]) -> None:
        """This rank's samples of a step."""
        self.rows.append({"step": step, "keys": list(keys), "positions": list(positions)})

    def write(self, folder: Path) -> Path:
        """To `nonfinite-RANK.json`, each rank its own."""
        path = folder / f"nonfinite-{dist.rank()}.json"
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(list(self.rows), indent=1), encoding="utf-8")
        return path


@dataclass(frozen=True)
class Straggler:
    """A rank whose own time per step is `ratio` times the median of all ranks'."""

    rank: int
    host: str
    ratio: float
    seconds: float
    data: float

    def __str__(self) -> str:
        return (
            f"straggler: rank {self.rank} on {self.host} takes {self.seconds * 1e3:.0f} ms of its own per step, "
            f"{self.ratio:.1f} x the median, {self.data * 1e3:.0f} ms of it waiting for data"
        )


def hosts() -> list[str]:
    """Every rank's host name; collective."""
    name = socket.gethostname().encode()[:64].ljust(64)
    rows = dist.gather(torch.tensor([list(name)], dtype=torch.uint8, device=dist.device()))
    return [bytes(row).decode(errors="replace").strip() for row in rows.cpu().tolist()]


def straggler(seconds: Sequence[float], data: Sequence[float], names: Sequence[str], above: float) -> Straggler | None:
    """The slowest rank if it is above `above` times the median of the others.

    `seconds` are a rank's own per step, those of waiting for data included; `data` are the latter.
    With two ranks the other one is the median.
    """
    if len(seconds) < 2 or not above:
        return None
    rank = max(range(len(seconds)), key=lambda r: seconds[r])
    middle = statistics.median(s for r, s in enumerate(seconds) if r != rank)
    if seconds[rank] <= above * middle:
        return None
    return Straggler(rank, names[rank], seconds[rank] / max(middle, 1e-9), seconds[rank], data[rank])
