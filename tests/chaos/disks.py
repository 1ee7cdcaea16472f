"""Disks that are full or read-only: the run ends, what was saved stays whole, and the next start goes on."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.chaos.training import LIMIT, Training, config

Fault = Callable[[Path, int], contextlib.AbstractContextManager[None]]
"""Breaks a disk while it is entered, given the size of a checkpoint."""


@dataclass
class Disk:
    """What a run did on a disk that failed. `whole` are the checkpoints that were complete while it did."""

    kind: str
    skipped: str = ""
    codes: tuple[int | None, ...] = ()
    whole: int = 0
    lost_checkpoints: int = 0
    curve_equal: bool = False

    def record(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@contextlib.contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[str]:
    """A disk of some size; yields why there is none, or ""."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        yield "needs root to mount a small disk"
        return
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        yield f"mount: {mounted.stderr.strip()}"
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def _calm(root: Path, path: Path) -> list[float]:
    calm = Training(path, root / f"calm-{path.stem}", root / "scratch" / f"calm-{path.stem}")
    if not calm.rows():
        calm.start()
        assert calm.wait() == [0, 0], calm.said()
    return [r["loss"] for r in calm.rows()]


def full(root: Path, steps: int = 10) -> Disk:
    """A disk that is full when a checkpoint is written."""
    return _failing("full", root, steps, _filled)


def read_only(root: Path, steps: int = 10) -> Disk:
    """A disk that turned read-only, as a file system with errors does."""
    return _failing("read-only", root, steps, _frozen)


def _failing(kind: str, root: Path, steps: int, fault: Fault) -> Disk:
    """Some steps, a start while `fault` lasts, and a start after it."""
    found, disk, path = Disk(kind), root / f"disk-{kind}", config(root, steps)
    losses = _calm(root, path)
    with tmpfs(disk, "64m") as reason:
        if reason:
            found.skipped = reason
            return found
        run = Training(path, disk / "run", root / "scratch" / kind)
        before = _some_steps(run)
        with fault(disk, _size(run.checkpoints / f"step-{before[-1]}")):
            run.start()
            found.codes = tuple(run.wait())
            found.whole = len(run.whole())
            found.lost_checkpoints = len(set(before) - set(run.whole()))
        run.start()
        assert run.wait() == [0, 0], run.said()
        found.curve_equal = [r["loss"] for r in run.rows()] == losses
    return found


@contextlib.contextmanager
def _filled(disk: Path, checkpoint: int) -> Iterator[None]:
    """Half a checkpoint's room is left."""
    ballast, space = disk / "ballast", os.statvfs(disk)
    with ballast.open("wb") as file:
        file.write(b"\0" * max(0, space.f_bavail * space.f_frsize - checkpoint // 2))
    yield
    ballast.unlink()


@contextlib.contextmanager
def _frozen(disk: Path, checkpoint: int) -> Iterator[None]:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    yield
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


def _some_steps(run: Training) -> list[int]:
    """Train until there are checkpoints, and kill; the steps of those that are whole."""
    run.start()
    end = time.monotonic() + LIMIT
    while run.step() < 4 and not run.ended() and time.monotonic() < end:
        time.sleep(0.01)
    run.kill((0, 1))
    return run.whole()


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir())
