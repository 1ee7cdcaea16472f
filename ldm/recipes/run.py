"""From a checked config to a finished run folder."""

from __future__ import annotations

import contextlib
import json
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from omegaconf import OmegaConf

from ldm import allocator, dist
from ldm.checkpoint import files
from ldm.checkpoint.lock import RunLock, RunLocked
from ldm.precision import DTYPES, chosen
from ldm.recipes import record as records
from ldm.recipes.aside import set_aside
from ldm.recipes.base import Assembly
from ldm.recipes.pictures import on_first as told_on_first
from ldm.train import engine, state
from ldm.train.changes import Change, Record, compare, told
from ldm.train.stop import before_training
from ldm.train.trainer import TrainConfig, Trainer
from ldm.train.writer import on_first


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a start treats what is in the run folder.

    `allow` goes on where the run would become something else, and keeps in the log what was changed. `scratch` begins
    at step 0 and keeps what an earlier run wrote in `earlier-N`.
    """

    allow: bool = False
    scratch: bool = False


@dataclass
class _Found:
    """The run so far: its newest checkpoint's step (-1: none) and, on rank 0, what is not as it was."""

    step: int = -1
    changes: list[Change] = field(default_factory=list)


def run(
    build: Callable[[], Assembly],
    train: TrainConfig,
    out: Path,
    *,
    seed: int,
    resolved: str,
    start: Start | None = None,
) -> int:
    """Train in the run folder `out`, resuming what is there, and export at the end; the process's exit code.

    `resolved` is the whole config as YAML. A start that is refused leaves the folder as it was. Raises ValueError when
    the folder holds a run with another model, data or objective, or one of which every checkpoint is damaged, or when
    another process runs in it.
    """
    with before_training():
        return _run(build, train, out, seed=seed, resolved=resolved, start=start or Start())


def _run(
    build: Callable[[], Assembly], train: TrainConfig, out: Path, *, seed: int, resolved: str, start: Start
) -> int:
    allocator.keep_freed_memory(dist.device().type)  # here, as caches are encoded before there is an engine
    engine.start()
    train, resolved = settled(train, resolved, out)
    if not start.scratch and dist.from_first(int(_finished(out, train.steps, resolved))):
        dist.say(f"{out}: already finished {train.steps} steps; exported to {out / 'export'}")
        return 0
    record: Record = {}
    told_on_first(lambda: record.update(records.make(resolved)))
    with _only_writer(out) as guard:
        found = _look(out, train, record, start)
        return _train(build, train, out, guard, found, record, start, seed=seed, resolved=resolved)


def settled(train: TrainConfig, resolved: str, out: Path) -> tuple[TrainConfig, str]:
    """The settings and their YAML with `precision: auto` replaced by what it means here; collective.

    A run that began in `out` goes on as its own config says, also on another machine, so that its arithmetic stays.
    """
    if train.engine.precision != "auto":
        return train, resolved
    words = list(DTYPES)
    found = _earlier(out) if dist.rank() == 0 else None
    earlier = dist.from_first(-1 if found is None else words.index(found))
    name = chosen("auto") if earlier < 0 else words[earlier]
    if earlier >= 0:
        dist.say(f"precision auto: {name}, as this run began")
    tree = OmegaConf.create(resolved)
    if OmegaConf.select(tree, "train.engine.precision") is not None:
        OmegaConf.update(tree, "train.engine.precision", name)
        resolved = OmegaConf.to_yaml(tree)
    told = typing.cast("Literal['fp32', 'bf16', 'fp16']", name)
    return replace(train, engine=replace(train.engine, precision=told)), resolved


def _earlier(out: Path) -> str | None:
    """The precision that the run of this folder has, None where none began."""
    config = out / "config.yaml"
    began = (out / "done.json").is_file() or bool(files.steps(out / "checkpoints"))
    if not (began and config.is_file()):
        return None
    found = OmegaConf.select(OmegaConf.create(config.read_text(encoding="utf-8")), "train.engine.precision")
    return found if found in DTYPES else None


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


def _look(out: Path, train: TrainConfig, record: Record, start: Start) -> _Found:
    """What is in the run folder; collective. Raises ValueError, on all ranks, where this start may not go on."""
    found = _Found()

    def look() -> None:
        newest = None if start.scratch else files.newest_of_run(out / "checkpoints")
        if newest is None:
            _check_gone(out, start)
            return
        found.step = files.step_of(newest)
        found.changes = _changes(newest, record, start)
        if found.changes:
            dist.say(f"not as in {newest}: {told(found.changes)}")
        if found.step > train.steps:
            dist.say(
                f"train.steps is {train.steps}, but {newest} has done {found.step}: nothing is left to train, and "
                f"it is exported as it is; `ldm export {out} OUT --step N` writes an earlier checkpoint"
            )

    told_on_first(look)
    found.step = dist.from_first(found.step)
    return found


def _changes(newest: Path, record: Record, start: Start) -> list[Change]:
    """What is not as in a checkpoint. Raises ValueError for what would make the run something else."""
    before = state.read_state(newest).get("trained_with")
    if before is None:
        dist.say(f"{newest} does not say what it was trained with: nothing is compared")
        return []
    changes = compare(before, record)
    record["history"] = [
        *before.get("history", []),
        *([{"step": files.step_of(newest), "changes": [str(c) for c in changes]}] if changes else []),
    ]
    odd = [change for change in changes if change.makes]
    if odd and not start.allow:
        goes_on = "--allow-changes goes on with it and writes it into the log; or "
        raise ValueError(
            f"{newest} was trained with something else: {told(odd)}. Take another `out`; or "
            f"{goes_on if all(c.makes != 'another model' for c in odd) else ''}"
            "--from-scratch begins at step 0 and keeps what is there"
        )
    return changes


def _check_gone(out: Path, start: Start) -> None:
    """Raise ValueError where a run ended of which no checkpoint is left: step 0 would write over its export."""
    done = _done(out)
    if done and not start.scratch:
        raise ValueError(
            f"{out}: a run has finished {done} steps here, and none of its checkpoints is left to go on from; take "
            "another `out`, or --from-scratch begins at step 0 and keeps what is there"
        )


def _train(
    build: Callable[[], Assembly],
    train: TrainConfig,
    out: Path,
    guard: Callable[[], None],
    found: _Found,
    record: Record,
    start: Start,
    *,
    seed: int,
    resolved: str,
) -> int:
    with _room(out, record, start, guard):
        assembly = build()
        told_on_first(lambda: _complete(out, found, record, start))
        trainer = Trainer(
            train, assembly.objective, assembly.loader, out, seed=seed, settings=resolved, guard=guard,
            record=record if dist.rank() == 0 else None, changes=_shared(found.changes),
        )  # fmt: skip
    trainer.resume(found.step)

    def begin() -> None:
        guard()
        (out / "log").mkdir(parents=True, exist_ok=True)
        if found.changes and (out / "config.yaml").is_file():
            kept = out / "log" / f"config-until-step-{found.step}.yaml"
            files.write_text(kept, (out / "config.yaml").read_text(encoding="utf-8"))
        files.write_text(out / "config.yaml", resolved)

    on_first(begin)
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


def _room(
    out: Path, record: Record, start: Start, guard: Callable[[], None]
) -> contextlib.AbstractContextManager[None]:
    """Where a start begins anew, what was there is set aside; data that the recipe writes of pictures too."""
    if not start.scratch:
        return contextlib.nullcontext()
    task = (record.get("config") or {}).get("task") or {}
    writes = bool(dist.from_first(int(records.writes_data(task))))
    if writes and record:
        record["content"]["data"] = [None for _ in record["content"]["data"]]
    return set_aside(out, writes, guard)


def _complete(out: Path, found: _Found, record: Record, start: Start) -> None:
    """Compare the data that only the recipe has written."""
    config = record.get("config") or {}
    content = record.get("content") or {}
    if None not in content.get("data", []):
        return
    content["data"] = records.data_content(config)
    if found.step >= 0:
        found.changes = _changes(out / "checkpoints" / f"step-{found.step}", record, start)


def _shared(changes: list[Change]) -> list[Change]:
    """Rank 0's changes, as far as other ranks need them: whether the optimizer is another."""
    own = [c for c in changes if c.key == "train.optim.algorithm"]
    if dist.from_first(len(own)) and dist.rank() != 0:
        return [Change("train.optim.algorithm", None, None)]
    return changes


def _done(out: Path) -> int:
    """How many steps a finished run made here; 0 without."""
    try:
        return int(json.loads((out / "done.json").read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _finished(out: Path, steps: int, resolved: str) -> bool:
    """Whether this very config has run to its end here."""
    config = out / "config.yaml"
    return config.is_file() and config.read_text(encoding="utf-8") == resolved and _done(out) == steps
