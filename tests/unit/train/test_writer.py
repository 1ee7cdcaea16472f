"""Checkpoints written beside training: not waited for, whole or absent, and what goes wrong comes to light."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.checkpoint import files
from ldm.checkpoint.lock import LockLost
from ldm.train import state
from ldm.train.trainer import AGAIN, CheckpointConfig
from ldm.train.writer import SaveFailed
from tests.unit.train.test_trainer import Hook, rows
from tests.unit.train.test_trainer import make as make  # the fixture


class Do(Hook):
    """Calls something after a step."""

    def __init__(self, step: int, act: Any) -> None:
        super().__init__(1)
        self.step, self.act = step, act

    def __call__(self, trainer: Any, step: int) -> None:
        if step == self.step:
            self.act(trainer)


def test_training_goes_on_while_the_disk_is_slow(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer is held at step 3 until step 5 has run; what it writes is what there was at step 3."""
    gate, write = threading.Event(), state.write
    published: list[list[int]] = []

    def slow(held: Any, beside: Path) -> None:
        assert gate.wait(60)
        write(held, beside)

    def look(trainer: Any) -> None:
        published.append(files.steps(trainer.checkpoints))
        gate.set()

    calm = make(out="calm", checkpoint=CheckpointConfig(every=3, keep=0, asynchronous=False))
    calm.run([])
    monkeypatch.setattr(state, "write", slow)
    trainer = make(checkpoint=CheckpointConfig(every=3, keep=0))
    assert trainer.run([Do(5, look)]) == 0
    assert published == [[]]
    assert files.steps(trainer.checkpoints) == files.steps(calm.checkpoints) == [3, 6, 8]
    for step in (3, 6, 8):
        for kind in ("w", "ema", "s.exp_avg"):
            a, b = (state.Shards(t.checkpoints / f"step-{step}") for t in (trainer, calm))
            for name in ("trained.weight", "trained.bias"):
                found, expected = (torch.empty(3 if "weight" in name else 1) for _ in range(2))
                a.fill(kind, name, 0, found)
                b.fill(kind, name, 0, expected)
                assert torch.equal(found, expected)


def test_a_signal_waits_for_the_disk(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write = state.write

    def slow(held: Any, beside: Path) -> None:
        threading.Event().wait(0.5)
        write(held, beside)

    monkeypatch.setattr(state, "write", slow)
    trainer = make()
    assert trainer.run([Do(4, lambda _: os.kill(os.getpid(), 15))]) == AGAIN
    assert files.steps(trainer.checkpoints) == [3, 5]
    assert all(files.damage(trainer.checkpoints / f"step-{s}") is None for s in (3, 5))


def test_milestones_stay_beside_the_newest(make: Any) -> None:
    trainer = make(steps=21, checkpoint=CheckpointConfig(every=2, keep=2, keep_every=6))
    trainer.run([])
    assert files.steps(trainer.checkpoints) == [6, 12, 18, 20, 21]
    with pytest.raises(ValueError, match="keep_every: 5 is not a multiple of every 2"):
        CheckpointConfig(every=2, keep_every=5)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_fills_up_stops_the_run_and_loses_nothing(
    make: Any, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    describe = files.describe

    def full(path: Path) -> Any:
        if "step-6" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return describe(path)

    monkeypatch.setattr(files, "describe", full)
    config = CheckpointConfig(every=3, keep=1, asynchronous=asynchronous)
    trainer = make(checkpoint=config)
    with pytest.raises(SaveFailed, match=r"step 6 could not be written.*No space left"):
        trainer.run([])
    assert files.steps(trainer.checkpoints) == [3]
    assert files.damage(trainer.checkpoints / "step-3") is None
    monkeypatch.undo()
    again = make(checkpoint=config)
    assert again.run([]) == 0
    calm = make(out="calm")
    calm.run([])
    assert [r["loss"] for r in rows(again)] == [r["loss"] for r in rows(calm)]


def test_a_lost_lock_comes_to_light_at_a_later_step(make: Any) -> None:
    trainer = make()
    calls = []

    def guard() -> None:
        calls.append(trainer.step)
        if len(calls) == 2:
            raise LockLost("taken over")

    trainer.writer._guard = guard
    with pytest.raises(LockLost, match="taken over"):
        trainer.run([])
    assert files.steps(trainer.checkpoints) == [3]


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A file system of so many KiB; skipped where one cannot be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(make: Any, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 400) as disk:
        trainer = make()
        trainer.out, trainer.checkpoints = disk, disk / "checkpoints"

        def fill(_: Any) -> None:
            with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

        with pytest.raises(SaveFailed, match="No space left"):
            trainer.run([Do(5, fill)])
        assert files.newest(disk / "checkpoints") == disk / "checkpoints" / "step-3"


def test_a_disk_that_turns_read_only(make: Any, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4000) as disk:
        trainer = make()
        trainer.checkpoints = disk / "checkpoints"

        def freeze(_: Any) -> None:
            until = time.monotonic() + 60  # the checkpoint of step 3 is written in the background
            while files.newest(disk / "checkpoints") is None and time.monotonic() < until:
                time.sleep(0.01)
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

        with pytest.raises(SaveFailed, match="Read-only file system"):
            trainer.run([Do(5, freeze)])
        assert files.newest(disk / "checkpoints") == disk / "checkpoints" / "step-3"


@pytest.mark.parametrize("harm", ["cut", "flip"])
@pytest.mark.parametrize("name", ["shard-00000.safetensors", "objective.safetensors", "state.json"])
def test_a_damaged_file_is_never_loaded(make: Any, harm: str, name: str) -> None:
    trainer = make(steps=6)
    trainer.run([])
    path = trainer.checkpoints / "step-6" / name
    data = bytearray(path.read_bytes())
    if harm == "cut":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    again = make()
    with pytest.warns(UserWarning, match="step-6 is damaged"):
        assert again.run([]) == 0
    assert [r["step"] for r in rows(again)] == list(range(1, 9))
    calm = make(out="calm")
    calm.run([])
    assert all(torch.equal(again.weights()[n], v) for n, v in calm.weights().items())
