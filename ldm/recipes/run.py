"""From a checked config to a finished run folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm import allocator, dist
from ldm.checkpoint import files
from ldm.checkpoint.lock import RunLock, RunLocked
from ldm.recipes.base import Assembly
from ldm.train import engine
from ldm.train.stop import before_training
from ldm.train.trainer import TrainConfig, Trainer
from ldm.train.writer import on_first


def run(build: Callable[[], Assembly], train: TrainConfig, out: Path, *, seed: int, resolved: str) -> int:
    """Train in the run folder `out`, resuming what is there, and export at the end; the process's exit code.

    `resolved` is the whole config as YAML. Raises ValueError when the folder holds a run with another model or data,
    or another process runs in it.
    """
    with before_training():
        return _run(build, train, out, seed=seed, resolved=resolved)


def _run(build: Callable[[], Assembly], train: TrainConfig, out: Path, *, seed: int, resolved: str) -> int:
    allocator.keep_freed_memory(dist.device().type)  # here, as caches are encoded before there is an engine
    engine.start()
    if dist.from_first(int(_finished(out, train.steps, resolved))):
        dist.say(f"{out}: already finished {train.steps} steps; exported to {out / 'export'}")
        return 0
    with _only_writer(out) as guard:
        return _train(build, train, out, guard, seed=seed, resolved=resolved)


@contextmanager
def _only_writer(out: Path) -> Iterator[Callable[[], None]]:
    """Hold the run folder's lock on rank 0; yields what raises LockLost there once another took the folder over.

    Raises RunLocked, a ValueError, on all ranks when another process runs in the folder.
    """
    lock, refused = RunLock(out), None
    if dist.rank() == 0:
        try:
            lock.acquire()
        except RunLocked as error:
            refused = error
    if dist.from_first(int(refused is not None)):
        raise refused or RunLocked(f"{out}: in use; rank 0 tells by whom")
    try:
        yield lock.check
    finally:
        lock.release()


def _train(
    build: Callable[[], Assembly], train: TrainConfig, out: Path, guard: Callable[[], None], *, seed: int, resolved: str
) -> int:
    if dist.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "log").mkdir(exist_ok=True)
        files.write_text(out / "config.yaml", resolved)
    dist.barrier()
    assembly = build()
    trainer = Trainer(train, assembly.objective, assembly.loader, out, seed=seed, settings=resolved, guard=guard)
    code = trainer.run(assembly.hooks)
    if code == 0:
        weights = trainer.weights()

        def finish() -> None:
            guard()
            assembly.export(weights, out / "export")
            files.write_text(out / "done.json", json.dumps({"step": trainer.step, "skipped": trainer.skipped}))

        on_first(finish)
        dist.say(f"finished {trainer.step} steps; exported to {out / 'export'}")
    return code


def _finished(out: Path, steps: int, resolved: str) -> bool:
    """Whether this very config has run to its end here."""
    config, done = out / "config.yaml", out / "done.json"
    if not (config.is_file() and done.is_file() and config.read_text(encoding="utf-8") == resolved):
        return False
    return json.loads(done.read_text(encoding="utf-8")).get("step") == steps
